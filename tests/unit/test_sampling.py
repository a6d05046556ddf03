"""Sampling against a naive reference, and its independence of everything but row, seed and position."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling_cases import NO_HISTORY, OPTIONS, spec

from flexpipe_serve.kernels import sampling
from flexpipe_serve.kernels.sampling import sample, token_uniform
from flexpipe_serve.pipeline.messages import SampleSpec


def draw(row: Sequence[float], num_draws: int, **options: Any) -> np.ndarray:
    """Tokens of ``num_draws`` positions that all have the same logits."""
    options = {"temperature": 1.0, "seed": 7} | options
    logits = torch.tensor([row]).expand(num_draws, -1).contiguous()
    return sample(logits, [spec(position, **options) for position in range(num_draws)], NO_HISTORY).tokens


def reference_kept(row: Sequence[float], *, temperature: float, top_k: int, top_p: float, min_p: float) -> list[int]:
    """Token ids that may be drawn, likeliest first, computed the long way."""
    peak = max(row)
    weights = [math.exp((logit - peak) / temperature) for logit in row]
    ranking = sorted(range(len(row)), key=lambda token: (-weights[token], token))
    ranking = [token for token in ranking if weights[token] >= min_p]
    if top_k > 0:
        ranking = ranking[:top_k]
    wanted = top_p * sum(weights[token] for token in ranking)
    kept, total = [], 0.0
    for token in ranking:
        if total >= wanted * (1 + 1e-9) and kept:
            break
        kept.append(token)
        total += weights[token]
    return kept


def chi_square(tokens: np.ndarray, probabilities: Sequence[float]) -> float:
    """Pearson's statistic in standard deviations from its mean (normal approximation)."""
    expected = np.array(probabilities) * len(tokens)
    observed = np.bincount(tokens, minlength=len(expected))
    assert not observed[expected == 0].any()
    used = expected > 0
    degrees = int(used.sum()) - 1
    statistic = float((((observed - expected)[used]) ** 2 / expected[used]).sum())
    return (statistic - degrees) / math.sqrt(2 * degrees)


@pytest.fixture(params=[1, 2])
def num_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


# Greedy


def test_greedy_takes_the_lowest_index_of_the_largest_logits() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0], [5.0, 5.0, 5.0, 5.0], [-4.0, -9.0, -math.inf, -4.0]])
    output = sample(logits, [spec(), spec(), spec(temperature=9e-6)], NO_HISTORY)
    assert output.tokens.tolist() == [1, 0, 0]
    assert output.tokens.dtype == np.int32
    assert output.logprobs == ()


def test_logits_are_not_changed() -> None:
    logits = torch.randn(3, 50)
    before = logits.clone()
    specs = [spec(temperature=0.5), spec(logit_bias=((3, 5.0),)), spec(repetition_penalty=2.0, num_history=2)]
    sample(logits, specs, np.array([1, 2], np.int32))
    assert torch.equal(logits, before)


# Distribution


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_distribution_is_the_softmax(temperature: float) -> None:
    row = [0.3, -1.0, 2.0, 1.9, -math.inf, 0.0, -3.0]
    expected = torch.softmax(torch.tensor(row, dtype=torch.float64) / temperature, 0).tolist()
    assert abs(chi_square(draw(row, 20_000, temperature=temperature), expected)) < 4


def test_distribution_over_seeds_at_one_position() -> None:
    logits = torch.zeros(20_000, 8)
    tokens = sample(logits, [spec(3, temperature=1.0, seed=seed) for seed in range(20_000)], NO_HISTORY).tokens
    assert abs(chi_square(tokens, [1 / 8] * 8)) < 4


def test_distribution_with_top_k_and_top_p() -> None:
    row = [2.0, 0.0, 1.5, -1.0, 1.0, -5.0]
    tokens = draw(row, 20_000, top_k=4, top_p=0.9)
    kept = reference_kept(row, temperature=1.0, top_k=4, top_p=0.9, min_p=0.0)
    assert 1 < len(kept) < 4
    weights = [math.exp(logit) if token in kept else 0.0 for token, logit in enumerate(row)]
    assert abs(chi_square(tokens, [weight / sum(weights) for weight in weights])) < 4


def test_neighbouring_seeds_and_positions_are_uncorrelated() -> None:
    grid = np.array([[token_uniform(seed=seed, position=position) for position in range(200)] for seed in range(200)])
    for a, b in ((grid[:, 1:], grid[:, :-1]), (grid[1:], grid[:-1]), (grid[1:, :-1], grid[:-1, 1:]), (grid, grid.T)):
        # 40,000 independent pairs correlate by 0.005 (standard deviation); the diagonal of the last pair is equal.
        off_diagonal = a != b
        assert abs(np.corrcoef(a[off_diagonal], b[off_diagonal])[0, 1]) < 0.025
    assert abs(grid.mean() - 0.5) < 0.007
    assert len(np.unique(grid)) == grid.size


def test_streams_of_two_seeds_are_not_one_stream_shifted() -> None:
    golden = 0x9E3779B97F4A7C15  # the step of splitmix64's state
    stream = {token_uniform(seed=5, position=position) for position in range(100)}
    assert not any(token_uniform(seed=5 + 3 * golden, position=position) in stream for position in range(100))


@given(seed=st.integers(-(2**63), 2**64), position=st.integers(0, 2**31))
def test_uniform_is_in_range(seed: int, position: int) -> None:
    assert 0.0 <= token_uniform(seed=seed, position=position) < 1.0


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
def test_extreme_random_numbers_never_pick_an_impossible_token(uniform: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "token_uniform", lambda *, seed, position: uniform)
    row = torch.full((1, 100_000), -math.inf)
    row[0, 70:90_000] = torch.randn(89_930)
    for options in ({}, {"top_k": 5}, {"top_p": 0.3}, {"min_p": 0.5}):
        (token,) = sample(row, [spec(temperature=1.0, **options)], NO_HISTORY).tokens
        assert row[0, token] > -math.inf
        if not options:
            assert token == (70 if uniform == 0 else 89_999)


# Which tokens may be drawn

ROWS = st.lists(st.integers(-40, 40).map(lambda n: n / 8), min_size=2, max_size=40)


@settings(max_examples=100, deadline=None)
@given(
    row=ROWS,
    temperature=st.sampled_from([0.3, 1.0, 1.7]),
    top_k=st.one_of(st.just(0), st.just(-1), st.integers(1, 45)),
    top_p=st.one_of(st.just(1.0), st.floats(0.01, 0.999)),
    min_p=st.one_of(st.just(0.0), st.floats(0.001, 1.0)),
)
def test_kept_tokens_are_those_of_the_reference(
    row: list[float], temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    kept = reference_kept(row, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    nearby = [
        reference_kept(row, temperature=temperature, top_k=top_k, top_p=p, min_p=m)
        for p, m in ((min(1.0, top_p * (1 + 1e-6)), min_p), (top_p * (1 - 1e-6), min_p), (top_p, min_p * (1 + 1e-6)))
    ]
    if any(other != kept for other in nearby):
        return  # the border falls within rounding
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    found = drawable(row, [spec(**options)])
    assert found == sorted(kept)


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"top_p": 0.5}, [0, 1]),
        ({"top_p": 0.501}, [0, 1, 2]),
        ({"top_p": 1e-9}, [0]),
        ({"top_k": 3}, [0, 1, 2]),
        ({"min_p": 1.0}, [0, 1, 2, 3]),
        ({"top_k": 2, "top_p": 0.5}, [0]),
    ],
)
def test_equally_likely_tokens_rank_by_index(options: dict[str, Any], kept: list[int]) -> None:
    assert drawable([1.0, 1.0, 1.0, 1.0], [spec(temperature=1.0, **options)]) == kept


def drawable(row: list[float], specs: list[SampleSpec]) -> list[int]:
    """All tokens that some random number picks: the cuts of the unit interval are found by bisection."""
    found: list[int] = []
    original = sampling.token_uniform

    def pick(uniform: float) -> int:
        sampling.token_uniform = lambda *, seed, position: uniform  # type: ignore[assignment]
        try:
            return int(sample(torch.tensor([row]), specs, NO_HISTORY).tokens[0])
        finally:
            sampling.token_uniform = original

    def search(low: float, low_token: int, high: float, high_token: int) -> None:
        if low_token == high_token or high - low < 1e-9:
            return
        middle = (low + high) / 2
        token = pick(middle)
        found.append(token)
        search(low, low_token, middle, token)
        search(middle, token, high, high_token)

    first, last = pick(0.0), pick(1 - 2**-53)
    search(0.0, first, 1 - 2**-53, last)
    return sorted({first, last, *found})


@settings(max_examples=100, deadline=None)
@given(data=st.data(), num_rows=st.integers(1, 5), vocab=st.integers(2, 60))
def test_cut_on_the_host_equals_the_cut_by_sorting(data: st.DataObject, num_rows: int, vocab: int) -> None:
    weight = st.one_of(st.integers(0, 5), st.integers(0, 2**40))
    rows = data.draw(st.lists(st.lists(weight, min_size=vocab, max_size=vocab), min_size=num_rows, max_size=num_rows))
    for row in rows:
        row[data.draw(st.integers(0, vocab - 1))] = 2**40  # the likeliest token
    options = st.fixed_dictionaries(
        {"top_k": st.integers(-1, vocab + 2), "top_p": st.one_of(st.just(1.0), st.floats(1e-6, 1.0))}
    )
    specs = [spec(**data.draw(options)) for _ in range(num_rows)]
    weights = torch.tensor(rows)
    by_sorting = sampling._cut_rows_by_sorting(weights, specs)
    for row, one in zip(weights, specs, strict=True):
        sampling._cut_row(row.numpy(), top_k=one.top_k, top_p=one.top_p)
    assert torch.equal(weights, by_sorting)


def test_cuts_agree_on_a_whole_vocabulary() -> None:
    torch.manual_seed(3)
    weights = (torch.randn(6, 50_000).mul(2).exp() * 2**30).long().clamp(max=2**40)
    weights[:, 17] = 2**40
    choices = [(0, 0.95), (50, 1.0), (50, 0.5), (0, 0.9999), (0, 1e-6), (40_000, 0.99)]
    specs = [spec(top_k=top_k, top_p=top_p) for top_k, top_p in choices]
    by_sorting = sampling._cut_rows_by_sorting(weights, specs)
    for row, one in zip(weights, specs, strict=True):
        sampling._cut_row(row.numpy(), top_k=one.top_k, top_p=one.top_p)
    assert torch.equal(weights, by_sorting)
    assert (weights > 0).sum(-1)[[1, 4]].tolist() == [50, 1]
    equal = torch.full((1, 4), 2**40)
    assert sampling._cut_rows_by_sorting(equal, [spec(top_p=0.5)]).tolist() == [[2**40, 2**40, 0, 0]]


# Independence of the batch


def test_a_row_gives_the_same_alone_and_in_any_batch(num_threads: int) -> None:
    generator = torch.Generator().manual_seed(1)
    vocab = 49_157  # odd: rows start at every alignment
    specs = [spec(11 * i, seed=i // 3, **OPTIONS[i % len(OPTIONS)]) for i in range(24)]
    logits = torch.randn(len(specs), vocab, generator=generator) * 3
    histories = [np.arange(i, i + one.num_history, dtype=np.int32) for i, one in enumerate(specs)]
    together = sample(logits, specs, np.concatenate(histories))
    order = torch.randperm(len(specs), generator=generator).tolist()
    torch.set_num_threads(3 - num_threads)
    shuffled = sample(logits[order], [specs[i] for i in order], np.concatenate([histories[i] for i in order]))
    for place, i in enumerate(order):
        alone = sample(logits[i : i + 1].clone(), [specs[i]], histories[i])
        assert together.tokens[i] == shuffled.tokens[place] == alone.tokens[0]
        expected = alone.logprobs[0] if alone.logprobs else None
        assert together.logprobs[i] == shuffled.logprobs[place] == expected
    assert len(set(together.tokens.tolist())) > 20, "the test would not see rows mixed up"


def test_small_noise_in_the_logits_hardly_ever_changes_a_token() -> None:
    torch.manual_seed(5)
    logits = torch.randn(300, 2_000) * 2
    specs = [spec(i, temperature=1.0, seed=1, top_p=0.95) for i in range(300)]
    noisy = logits * (1 + 1e-6 * torch.randn_like(logits))
    changed = sample(logits, specs, NO_HISTORY).tokens != sample(noisy, specs, NO_HISTORY).tokens
    assert changed.sum() <= 2


def test_nothing_to_sample() -> None:
    output = sample(torch.zeros(0, 10), [], NO_HISTORY)
    assert output.tokens.shape == (0,)
    assert output.logprobs == ()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_agrees_with_the_host() -> None:
    torch.manual_seed(6)
    specs = [spec(i, seed=i, **OPTIONS[i % len(OPTIONS)]) for i in range(64)]
    logits = torch.randn(len(specs), 49_152) * 3
    history = np.arange(sum(one.num_history for one in specs), dtype=np.int32)
    host, device = sample(logits, specs, history), sample(logits.cuda(), specs, history)
    assert host.tokens.tolist() == device.tokens.tolist()
    alone = [sample(logits[i : i + 1].cuda(), [specs[i]], NO_HISTORY).tokens[0] for i in range(7)]
    assert alone == device.tokens[:7].tolist()
