"""Bias, penalties and log probabilities against references, and rows that are no distribution."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling_cases import NO_HISTORY, OPTIONS, spec

from flexpipe_serve.kernels import sampling
from flexpipe_serve.kernels.sampling import INVALID_TOKEN, prompt_logprobs, sample
from flexpipe_serve.pipeline.messages import LogprobResult

# Bias and penalties


@settings(max_examples=100, deadline=None)
@given(
    data=st.data(),
    row=st.lists(st.floats(-8, 8, width=32), min_size=4, max_size=20),
    repetition=st.one_of(st.just(1.0), st.floats(0.5, 2.0)),
    presence=st.one_of(st.just(0.0), st.floats(-2, 2)),
    frequency=st.one_of(st.just(0.0), st.floats(-2, 2)),
)
def test_bias_and_penalties_are_those_of_the_reference(
    data: st.DataObject, row: list[float], repetition: float, presence: float, frequency: float
) -> None:
    token = st.integers(0, len(row) - 1)
    prompt = data.draw(st.lists(token, max_size=10))
    output = data.draw(st.lists(token, max_size=10))
    bias = data.draw(st.dictionaries(token, st.floats(-100, 100), max_size=3))
    expected = list(row)
    for biased, value in bias.items():
        expected[biased] += value
    for seen in {*prompt, *output}:
        expected[seen] = expected[seen] / repetition if expected[seen] > 0 else expected[seen] * repetition
    for seen in set(output):
        expected[seen] -= frequency * output.count(seen) + presence
    one = spec(
        repetition_penalty=repetition,
        presence_penalty=presence,
        frequency_penalty=frequency,
        num_history=len(prompt) + len(output),
        num_prompt=len(prompt),
        logit_bias=tuple(bias.items()),
    )
    other = spec(num_history=2)  # a neighbour whose history must not be mistaken for this row's
    logits = torch.tensor([row, row, row])
    history = np.array([0, 1, *prompt, *output], np.int32)
    edited = sampling._edit(logits, [other, one, spec()], history)
    np.testing.assert_allclose(edited[1].numpy(), np.array(expected, np.float32), rtol=1e-5, atol=1e-4)
    assert torch.equal(edited[[0, 2]], logits[[0, 2]])


def test_penalties_change_the_choice() -> None:
    row = torch.tensor([[4.0, 3.5, 1.0, -6.0]])
    history = np.array([0, 1, 1], np.int32)  # one prompt token, two generated

    def choose(**options: Any) -> int:
        return int(sample(row, [spec(num_history=3, num_prompt=1, **options)], history).tokens[0])

    assert choose() == 0
    assert choose(repetition_penalty=5.0) == 2
    assert choose(presence_penalty=2.0, frequency_penalty=2.0) == 0, "a prompt token is no output"
    assert choose(presence_penalty=-2.0) == 1
    assert int(sample(row, [spec(logit_bias=((3, 100.0), (0, -100.0)))], NO_HISTORY).tokens[0]) == 3


# Log probabilities


def test_logprobs_are_those_of_the_raw_logits() -> None:
    torch.manual_seed(9)
    logits = torch.randn(20, 500) * 4
    expected = torch.log_softmax(logits.double(), -1)
    specs = [
        spec(i, temperature=0.5 * (i % 3), num_logprobs=i % 5 - 1, logit_bias=((i, 100.0),), top_k=7) for i in range(20)
    ]
    output = sample(logits, specs, NO_HISTORY)
    assert output.tokens.tolist() == list(range(20))
    for i, (one, result) in enumerate(zip(specs, output.logprobs, strict=True)):
        if one.num_logprobs < 0:
            assert result is None
            continue
        assert result is not None
        assert result.logprob == pytest.approx(expected[i, i].item(), abs=1e-5)
        values, ids = expected[i].topk(one.num_logprobs)
        assert [token for token, _ in result.top] == ids.tolist()
        assert [value for _, value in result.top] == pytest.approx(values.tolist(), abs=1e-5)


def test_equal_logprobs_rank_by_index_and_minus_infinity_is_finite() -> None:
    row = [[1.0, 0.0, -math.inf, 1.0, -0.0, -2.0]]
    (result,) = sample(torch.tensor(row), [spec(num_logprobs=20)], NO_HISTORY).logprobs
    assert result is not None
    assert [token for token, _ in result.top] == [0, 3, 1, 4, 5, 2]
    assert result.top[-1] == (2, -9999.0)


def test_prompt_logprobs() -> None:
    torch.manual_seed(2)
    logits = torch.randn(70, 300) * 3
    targets = torch.randint(0, 300, (70,)).numpy().astype(np.int32)
    expected = torch.log_softmax(logits.double(), -1)
    results = prompt_logprobs(logits, targets, 2)
    assert len(results) == 70
    for i, result in enumerate(results):
        assert result.logprob == pytest.approx(expected[i, targets[i]].item(), abs=1e-5)
        assert [token for token, _ in result.top] == expected[i].topk(2).indices.tolist()
    assert prompt_logprobs(logits, targets, 0) == tuple(LogprobResult(result.logprob) for result in results)
    assert prompt_logprobs(logits[:0], targets[:0], 5) == ()


# Rows that are no distribution


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "greedy")
def test_a_bad_row_gets_no_token_and_harms_no_neighbour(bad: float, options: dict[str, Any]) -> None:
    torch.manual_seed(4)
    logits = torch.randn(3, 1000)
    specs = [spec(5, seed=2, **options)] * 3
    history = np.arange(3 * specs[0].num_history, dtype=np.int32)
    healthy = sample(logits, specs, history)
    broken = logits.clone()
    broken[1] = -math.inf
    broken[1, 300] = bad
    output = sample(broken, specs, history)
    assert output.tokens.tolist() == [healthy.tokens[0], INVALID_TOKEN, healthy.tokens[2]]
    if healthy.logprobs:
        assert output.logprobs == (healthy.logprobs[0], None, healthy.logprobs[2])


def test_an_overflowing_penalty_is_a_bad_row() -> None:
    one = spec(temperature=1.0, repetition_penalty=1e-45, num_history=1)
    assert sample(torch.tensor([[3.0, 1.0]]), [one], np.array([0], np.int32)).tokens.tolist() == [INVALID_TOKEN]


def test_prompt_logprobs_of_a_bad_row_are_nan() -> None:
    results = prompt_logprobs(torch.tensor([[math.nan, 1.0], [0.0, 0.0]]), np.array([0, 1], np.int32), 1)
    assert math.isnan(results[0].logprob)
    assert results[1].logprob == pytest.approx(math.log(0.5))
