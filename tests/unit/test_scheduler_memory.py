"""The prefix cache, and preemption where blocks run out."""

from __future__ import annotations

import pytest
from scheduler_cases import fill, make_seq, make_sim, rows
from scheduler_sim import digest_of, reference

from flexpipe_serve.engine.request import SequenceStatus


def test_prompt_and_output_are_found_again_but_the_last_token_is_computed() -> None:
    sim = make_sim()
    first = make_seq("a", [1, 2, 3, 4, 1, 2, 3, 4], max_tokens=6)
    sim.add(first)
    sim.drain(20)
    # 14 tokens, of which 13 were computed: three full blocks of four.
    again = make_seq("b", first.tokens.view().tolist(), max_tokens=1)
    exact = make_seq("c", first.prompt_token_ids, max_tokens=1)
    sim.add(again)
    sim.add(exact)
    batch = sim.submit()
    assert batch is not None
    assert batch.num_computed.tolist() == [12, 4]
    assert (again.num_cached_tokens, exact.num_cached_tokens) == (12, 4)
    stats = sim.scheduler.stats()
    assert (stats.num_prompt_tokens, stats.num_prefix_hit_tokens) == (8 + 14 + 8, 16)


def test_a_block_in_a_step_in_flight_is_not_shared() -> None:
    sim = make_sim(num_stages=2)
    sim.add(make_seq("a", [1] * 9))
    sim.add(make_seq("b", [1] * 9))
    batches = fill(sim)
    assert [b.num_computed.tolist() for b in batches] == [[0], [0]]
    sim.add(make_seq("c", [1] * 9))
    sim.complete()
    (batch,) = fill(sim)
    assert batch.num_computed.tolist() == [9, 8]


def test_siblings_wait_until_the_first_has_computed_the_shared_prompt() -> None:
    sim = make_sim(max_num_batched_tokens=32)
    prompt = [i % 5 for i in range(50)]
    siblings = [make_seq("n", prompt, index=i, max_tokens=2) for i in range(4)]
    sim.add(*siblings)
    sim.add(make_seq("other", 4, max_tokens=9))
    assert rows(sim, sim.submit()) == ["n"]
    sim.complete()
    # Who has nothing to do with them is not held up.
    assert rows(sim, sim.submit()) == ["n", "other"]
    sim.complete()
    batch = sim.submit()
    assert rows(sim, batch) == ["n", "n", "n", "n", "other"]
    assert [s.num_cached_tokens for s in siblings] == [0, 48, 48, 48]
    sim.drain(20)
    for seq in siblings:
        assert sim.outputs[seq] == reference(prompt, seq.params, seq.index, 512)[0]


@pytest.mark.parametrize("how", ["no prefix cache", "prompt log probabilities", "prompt within a block"])
def test_siblings_with_nothing_to_share_start_together(how: str) -> None:
    sim = make_sim(prefix_cache=how != "no prefix cache")
    length = 4 if how == "prompt within a block" else 8
    sim.add(*(make_seq("n", length, index=i, prompt_logprobs=how == "prompt log probabilities") for i in range(3)))
    assert rows(sim, sim.submit()) == ["n", "n", "n"]


def test_siblings_go_on_when_the_first_ends_early() -> None:
    sim = make_sim(max_num_batched_tokens=32)
    siblings = [make_seq("n", 60, index=i, max_tokens=2) for i in range(3)]
    sim.add(*siblings)
    sim.submit()
    sim.scheduler.finish(siblings[0], "error", now=0.0)
    sim.complete()
    sim.drain(20)
    assert [s.finish_reason for s in siblings] == ["error", "length", "length"]


def test_prompt_logprobs_are_computed_in_spite_of_the_prefix_cache() -> None:
    sim = make_sim()
    prompt = [i % 5 for i in range(21)]
    sim.add(make_seq("a", prompt))
    sim.drain(20)
    seq = make_seq("b", prompt, prompt_logprobs=True)
    sim.add(seq)
    sim.drain(20)
    assert seq.num_cached_tokens == 0
    assert sim.prompt_logprobs[seq] == [(digest_of(prompt[:i]), prompt[i]) for i in range(1, 21)]


def test_the_newest_of_the_lowest_priority_is_preempted_and_goes_to_the_front() -> None:
    sim = make_sim(num_blocks=10, prefix_cache=False)
    names = [("a", 0), ("b", 1), ("c", 1)]
    for name, priority in names:
        sim.add(make_seq(name, 8, priority=priority, max_tokens=20))
        fill(sim)
        sim.complete()
    while sim.scheduler.stats().num_preemptions == 0:
        fill(sim)
        sim.complete()
    assert [s.request_id for s in sim.sequences if s.status is SequenceStatus.RUNNING] == ["a", "b"]
    preempted = sim.sequences[2]
    assert preempted.num_preemptions == 1
    late = make_seq("late", 4, priority=1, max_tokens=1)
    sim.add(late)
    sim.submit()
    while late.in_flight is None:
        sim.complete()
        sim.submit()
    assert preempted.status is SequenceStatus.RUNNING
    sim.complete()
    sim.drain(200)
    for seq in sim.sequences:
        assert sim.outputs[seq] == reference(seq.prompt_token_ids, seq.params, 0, 36)[0]


def test_a_sequence_in_flight_is_never_preempted() -> None:
    # a and b grow in turns, each in a step of its own; when a needs b's blocks, b is in flight: a waits its turn.
    sim = make_sim(num_stages=2, num_blocks=6, block_size=2, prefix_cache=False)
    sim.add(make_seq("a", 2, max_tokens=10))
    sim.add(make_seq("b", 2, max_tokens=10))
    num_steps = 0
    stalled = False
    while not sim.scheduler.is_idle:
        fill(sim)
        in_flight = [s for s in sim.sequences if s.in_flight is not None]
        assert all(s.status is SequenceStatus.RUNNING and len(s.block_table) for s in in_flight)
        a = sim.sequences[0]
        stalled |= a.in_flight is None and not a.is_finished
        sim.complete()
        num_steps += 1
        assert num_steps < 100
    assert stalled
    assert sim.scheduler.stats().num_preemptions > 0
    for seq in sim.sequences:
        assert sim.outputs[seq] == reference(seq.prompt_token_ids, seq.params, 0, 12)[0]


def test_a_sequence_already_chosen_for_the_step_is_not_preempted() -> None:
    # "b", lower in rank, was computed first, so it comes first in every step.
    sim = make_sim(num_stages=3, num_blocks=6, block_size=2, prefix_cache=False)
    sim.add(make_seq("b", 3, priority=1, max_tokens=8))
    fill(sim)
    sim.add(make_seq("a", 4, max_tokens=8))
    fill(sim)
    sim.complete()
    sim.complete()
    sim.pipeline.num_stages = 1
    sim.pipeline.kv = sim.pipeline.kv[:1]
    # At 7 and 6 tokens "a" needs a fourth block and "b" none: "b" is chosen, "a" waits its turn and then takes it all.
    sizes = []
    while sim.scheduler.stats().num_preemptions == 0:
        sizes.append(rows(sim, sim.submit()))
        sim.complete()
    assert sizes == [["a", "b"], ["a", "b"], ["b"], ["a"]]
    sim.drain(100)


@pytest.mark.parametrize("num_stages", [1, 2, 3])
@pytest.mark.parametrize("prefix_cache", [False, True])
def test_two_that_do_not_fit_together_both_finish_without_thrashing(num_stages: int, prefix_cache: bool) -> None:
    sim = make_sim(num_stages=num_stages, num_blocks=20, prefix_cache=prefix_cache)
    first, second = make_seq("a", 8, max_tokens=72), make_seq("b", 8, max_tokens=72)
    sim.add(first)
    sim.add(second)
    sim.drain(2 * 72 + 20)
    assert (first.finish_time or 0) < (second.finish_time or 0)
    assert first.num_preemptions == 0
    assert second.num_preemptions <= 3


def test_prompt_logprobs_are_delivered_once_though_the_sequence_is_preempted() -> None:
    sim = make_sim(num_blocks=28, max_num_seqs=4, max_num_batched_tokens=9, prefix_cache=False)
    prompt = [i % 5 for i in range(100)]
    sim.add(make_seq("first", 4, max_tokens=100))
    fill(sim)
    sim.complete()
    seq = make_seq("scored", prompt, prompt_logprobs=True, max_tokens=2)
    sim.add(seq)
    while seq.num_preemptions == 0:
        fill(sim)
        sim.complete()
    # In the midst of the prompt, and not where a later chunk of nine tokens would end.
    assert 0 < seq.num_prompt_logprobs < 99
    assert seq.num_prompt_logprobs % 9
    sim.drain(200)
    assert sim.prompt_logprobs[seq] == [(digest_of(prompt[:i]), prompt[i]) for i in range(1, 100)]
