"""Who serves a request: predictions, what is open where, whose cache has the beginning."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexpipe_serve.engine import prefix_directory
from flexpipe_serve.engine.prefix_directory import PrefixDirectory
from flexpipe_serve.engine.request_ledger import OpenRequest, RequestLedger
from flexpipe_serve.engine.routing import Ask, PipelineLoad, predict_finish_s, rank_pipelines
from flexpipe_serve.engine.step_costs import StepCost, StepCosts

IDLE = PipelineLoad(
    cost=StepCost(0.01, 0.001),
    num_sequences=0,
    num_pending_tokens=0,
    max_num_seqs=8,
    max_num_batched_tokens=64,
    max_len=1000,
)
ASK = Ask(num_prompt_tokens=100, num_output_tokens=20, max_len=200)
loads = st.builds(
    PipelineLoad,
    cost=st.none() | st.builds(StepCost, st.floats(0, 1), st.floats(0, 0.1)),
    num_sequences=st.integers(0, 50),
    num_pending_tokens=st.integers(0, 5000),
    max_num_seqs=st.integers(1, 64),
    max_num_batched_tokens=st.integers(64, 512),
    max_len=st.integers(1, 4000),
    is_up=st.booleans(),
)
asks = st.builds(
    Ask,
    num_prompt_tokens=st.integers(1, 3000),
    num_output_tokens=st.floats(0, 500),
    max_len=st.integers(1, 4000),
    num_sequences=st.integers(1, 4),
)


# ---------------------------------------------------------------------- steps


@given(
    step_s=st.floats(1e-4, 1), token_s=st.floats(1e-6, 0.1), counts=st.lists(st.integers(1, 512), min_size=2).filter(
        lambda counts: len(set(counts)) > 1
    )
)  # fmt: skip
def test_costs_are_the_line_that_steps_lie_on(step_s: float, token_s: float, counts: list[int]) -> None:
    costs = StepCosts()
    for count in counts * 5:
        costs.note(count, step_s + count * token_s, now=1.0)
    cost = costs.fit(now=2.0)
    assert cost is not None
    for count in counts:
        assert cost.seconds(count) == pytest.approx(step_s + count * token_s, rel=1e-3)


@given(st.lists(st.tuples(st.integers(1, 512), st.floats(0, 10)), min_size=1, max_size=30))
def test_costs_are_never_negative_and_keep_the_mean(steps: list[tuple[int, float]]) -> None:
    costs = StepCosts()
    for count, seconds in steps * 9:
        costs.note(count, seconds, now=1.0)
    cost = costs.fit(now=1.0)
    assert cost is not None
    assert cost.step_s >= 0
    assert cost.token_s >= 0
    longest = max(seconds for _, seconds in steps)
    assert cost.seconds(min(count for count, _ in steps)) <= longest * (1 + 1e-9)


def test_costs_follow_a_pipeline_that_changes() -> None:
    costs = StepCosts()
    for seconds in (0.1, 0.02):
        for _ in range(200):
            costs.note(4, seconds, now=1.0)
    cost = costs.fit(now=1.0)
    assert cost is not None
    assert cost.seconds(4) == pytest.approx(0.02, rel=0.1)


def test_little_is_known_at_first_and_nothing_after_a_while() -> None:
    costs = StepCosts()
    for number in range(7):
        costs.note(4, 3.0, now=number)
        assert costs.fit(now=number) is None
    costs.note(4, 3.0, now=7.0)
    assert costs.fit(now=12.0) == StepCost(pytest.approx(3.0), 0.0)
    assert costs.fit(now=12.1) is None
    for number in range(8):
        costs.note(4, 0.1, now=13.0 + number)
    assert costs.fit(now=20.0) == StepCost(pytest.approx(0.1), 0.0)


# ---------------------------------------------------------------------- prediction


@given(loads, asks, st.integers(0, 3000))
def test_more_to_do_takes_longer_and_what_is_cached_saves(load: PipelineLoad, ask: Ask, num_cached: int) -> None:
    cost = StepCost(0.01, 0.001)

    def seconds(num_cached_tokens: int = num_cached, *, load: PipelineLoad = load, ask: Ask = ask) -> float:
        return predict_finish_s(load, ask, num_cached_tokens=num_cached_tokens, cost=cost)

    assert 0 < seconds() <= seconds(0)
    assert seconds() <= seconds(load=replace(load, num_sequences=load.num_sequences + 1))
    assert seconds() < seconds(load=replace(load, num_pending_tokens=load.num_pending_tokens + 1))
    assert seconds() <= seconds(ask=replace(ask, num_output_tokens=ask.num_output_tokens + 1))
    assert seconds() <= seconds(load=replace(load, max_num_batched_tokens=64))


def test_the_prediction_by_hand() -> None:
    """128 tokens of prompts in two steps, then 20 steps of 5 sequences; behind a full pipeline as long again."""
    load = replace(IDLE, num_sequences=4, num_pending_tokens=28)
    predicted = predict_finish_s(load, ASK, num_cached_tokens=0, cost=StepCost(0.01, 0.001))
    assert predicted == pytest.approx(2 * 0.01 + 0.128 + 20 * (0.01 + 5 * 0.001))
    full = predict_finish_s(replace(IDLE, num_sequences=15), ASK, num_cached_tokens=0, cost=StepCost(0.01, 0.001))
    assert full == pytest.approx(2 * 0.01 + 0.1 + 2 * 20 * (0.01 + 8 * 0.001))


@given(st.lists(st.tuples(loads, st.integers(0, 3000)), min_size=1, max_size=5), asks)
def test_everybody_is_ranked_who_is_up_and_has_room_first(pipelines: list[tuple[PipelineLoad, int]], ask: Ask) -> None:
    found = [load for load, _ in pipelines]
    order = rank_pipelines(found, ask, num_cached_tokens=[cached for _, cached in pipelines])
    assert sorted(order) == list(range(len(found)))
    ranks = [(not found[i].is_up, -min(found[i].max_len, ask.max_len)) for i in order]
    assert ranks == sorted(ranks)


def test_equal_pipelines_get_equal_shares_from_the_first_request_on() -> None:
    for cost in (None, StepCost(0.01, 0.0)):  # no step yet; steps that were all alike
        ledger, shares = RequestLedger(), Counter[int]()
        for _ in range(20):
            found = [
                replace(
                    IDLE,
                    cost=cost,
                    num_sequences=ledger.num_sequences(i),
                    num_pending_tokens=ledger.num_pending_tokens(i),
                )
                for i in range(2)
            ]
            first, _ = rank_pipelines(found, ASK, num_cached_tokens=[0, 0])
            ledger.open(OpenRequest(first, 100, 1))
            shares[first] += 1
        assert shares == {0: 10, 1: 10}


def test_the_quicker_one_and_the_one_that_knows_the_beginning_come_first() -> None:
    slow = replace(IDLE, cost=StepCost(0.03, 0.001))
    assert rank_pipelines([slow, IDLE], ASK, num_cached_tokens=[0, 0]) == [1, 0]
    assert rank_pipelines([IDLE, IDLE], ASK, num_cached_tokens=[0, 96]) == [1, 0]
    # Not at any price: what is saved is less than the wait for what others have asked for.
    busy = replace(IDLE, num_pending_tokens=500)
    assert rank_pipelines([IDLE, busy], ASK, num_cached_tokens=[0, 96]) == [0, 1]


# ---------------------------------------------------------------------- what is open


@given(st.integers(0, 2**32))
def test_the_ledger_counts_what_is_open(seed: int) -> None:
    rng = random.Random(seed)
    ledger, requests = RequestLedger(), list[OpenRequest]()
    for _ in range(60):
        action = rng.choice(("open", "open", "begin", "move", "close"))
        if action == "open" or not requests:
            requests.append(OpenRequest(rng.randrange(3), rng.randrange(1, 100), rng.randrange(1, 4)))
            ledger.open(requests[-1])
            continue
        request = rng.choice(requests)
        if action == "begin" and not request.has_begun:
            ledger.begin(request)
        elif action == "move":
            ledger.move(request, rng.randrange(3))
        elif action == "close":
            ledger.close(request, num_output_tokens=rng.choice((None, 10)))
            requests.remove(request)
        for pipeline in range(3):
            here = [r for r in requests if r.pipeline == pipeline]
            assert ledger.num_sequences(pipeline) == sum(r.num_sequences for r in here)
            pending = sum(r.num_prompt_tokens for r in here if not r.has_begun)
            assert ledger.num_pending_tokens(pipeline) == pending


def test_lengths_of_answers_are_learnt_from_those_that_ended() -> None:
    ledger = RequestLedger()
    for num_output_tokens in [None] * 50 + [30] * 200:
        request = OpenRequest(0, 10, 3)
        ledger.open(request)
        ledger.close(request, num_output_tokens=num_output_tokens)
    assert ledger.mean_output_tokens == pytest.approx(10, rel=0.01)


# ---------------------------------------------------------------------- beginnings


@given(st.integers(0, 2**32))
def test_the_longest_beginning_that_a_pipeline_was_given(seed: int) -> None:
    rng = random.Random(seed)
    size = rng.randrange(1, 5)
    directory = PrefixDirectory(size)
    given_to: dict[int, list[list[int]]] = {0: [], 1: []}
    for _ in range(20):
        prompt = [rng.randrange(2) for _ in range(rng.randrange(20))]
        for pipeline, prompts in given_to.items():
            known = [_num_common(prompt, other) // size for other in prompts]
            assert directory.num_cached_tokens(pipeline, prompt) == size * max(known, default=0)
        pipeline = rng.randrange(2)
        directory.note(pipeline, prompt)
        given_to[pipeline].append(prompt)
    directory.forget(0)
    assert directory.num_cached_tokens(0, given_to[0][0] if given_to[0] else [1]) == 0


def _num_common(a: list[int], b: list[int]) -> int:
    """Tokens in common at the beginning of the whole blocks of both."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def test_what_was_used_longest_ago_is_forgotten_its_beginning_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_directory, "_MAX_KNOWN", 6)
    directory = PrefixDirectory(1)
    directory.note(0, [1, 2, 3, 4])
    directory.note(0, [9, 8, 7, 6])
    assert directory.num_cached_tokens(0, [9, 8, 7, 6]) == 4
    assert directory.num_cached_tokens(0, [1, 2, 3, 4]) == 2
    directory.note(0, [1, 2])
    directory.note(0, [5, 5])
    assert directory.num_cached_tokens(0, [1, 2, 3, 4]) == 2
    assert directory.num_cached_tokens(0, [9, 8, 7, 6]) == 2


def test_a_long_prompt_costs_no_more_than_its_first_blocks() -> None:
    directory = PrefixDirectory(2)
    prompt = list(range(100_000))
    directory.note(0, prompt)
    assert directory.num_cached_tokens(0, prompt) == 2 * prefix_directory._MAX_BLOCKS
