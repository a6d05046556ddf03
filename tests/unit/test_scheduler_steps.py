"""What goes into a step, and who is admitted."""

from __future__ import annotations

import pytest
from scheduler_cases import fill, make_seq, make_sim, rows

from flexpipe_serve.engine import row_choice


@pytest.mark.parametrize(
    ("num_seqs", "num_stages", "sizes"),
    [(1, 2, [1]), (2, 2, [1, 1]), (3, 2, [2, 1]), (16, 2, [8, 8]), (16, 1, [16]), (5, 4, [2, 2, 1]), (3, 4, [1, 1, 1])],
)
def test_steps_in_flight_share_the_sequences_evenly(num_seqs: int, num_stages: int, sizes: list[int]) -> None:
    sim = make_sim(num_stages=num_stages, max_num_batched_tokens=256)
    for i in range(num_seqs):
        sim.add(make_seq(f"s{i:02}", 8))
    assert [b.header.num_seqs for b in fill(sim)] == sizes
    for _ in range(3 * len(sizes)):
        sim.complete()
        (batch,) = fill(sim)
        assert batch.header.num_seqs in sizes
    assert sim.scheduler.stats().num_steps_in_flight == len(sizes)


def test_uneven_groups_even_out() -> None:
    sim = make_sim(num_stages=2, max_num_batched_tokens=256)
    for i in range(8):
        sim.add(make_seq(f"s{i}", 8, max_tokens=2 if i < 3 else 30))
    fill(sim)
    for _ in range(8):
        sim.complete()
        fill(sim)
    # Three of the first step's four are gone: five are left, of which three were together.
    assert sorted(s.batch.header.num_seqs for s in sim.pipeline.steps) == [2, 3]


def test_waiting_sequences_without_memory_do_not_swell_the_steps() -> None:
    # 8 run and nearly fill the KV; ten more wait. The 8 must stay in two groups of 4.
    sim = make_sim(num_stages=2, num_blocks=8 * 4 + 3, max_num_batched_tokens=256, prefix_cache=False)
    for i in range(8):
        sim.add(make_seq(f"s{i}", 9, max_tokens=7))
    assert [b.header.num_seqs for b in fill(sim)] == [4, 4]
    for i in range(10):
        sim.add(make_seq(f"w{i}", 32))
    for _ in range(6):
        sim.complete()
        sim.complete()
        assert [b.header.num_seqs for b in fill(sim)] == [4, 4]


def test_decodes_come_first_and_prefill_takes_what_remains_of_the_budget() -> None:
    sim = make_sim(max_num_seqs=8, max_num_batched_tokens=10)
    decodes = [make_seq(f"d{i}", 2, max_tokens=50) for i in range(3)]
    sim.add(*decodes)
    fill(sim)
    sim.complete()
    sim.add(make_seq("long", 30), make_seq("next", 30))
    for num_computed in (0, 7, 14, 21):
        batch = sim.submit()
        assert batch is not None
        assert batch.num_new.tolist() == [1, 1, 1, 7]
        assert batch.num_computed[3] == num_computed
        sim.complete()
    batch = sim.submit()
    assert batch is not None
    # The first prompt's last two tokens, and the next prompt's first five.
    assert batch.num_new.tolist() == [1, 1, 1, 2, 5]


def test_chunks_behind_a_long_context_are_smaller_while_others_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that computes a chunk of them keeps every stream waiting, and takes as long as its context is long."""
    monkeypatch.setattr(row_choice, "_LONG_CONTEXT", 32)
    sim = make_sim(max_num_seqs=8, max_num_batched_tokens=16)
    decode, long = make_seq("d", 2, max_tokens=12), make_seq("long", 200, max_tokens=1)
    sim.add(decode)
    fill(sim)
    sim.complete()
    sim.add(long)
    chunks = []
    while not decode.is_finished:
        batch = sim.submit()
        assert batch is not None
        chunks.append((int(batch.num_computed[-1]), int(batch.num_new[-1])))
        sim.complete()
    assert chunks[:4] == [(0, 15), (15, 15), (30, 15), (45, 11)]
    assert all(num_new * num_computed <= 16 * 32 for num_computed, num_new in chunks[3:])
    assert len(chunks) == 11
    alone = sim.submit()
    assert alone is not None
    assert alone.num_new.tolist() == [16]
    while not long.is_finished:
        sim.complete()
        sim.submit()
    assert long.num_output_tokens == 1


def test_prompts_begun_are_finished_in_order_of_rank() -> None:
    sim = make_sim(max_num_seqs=8, max_num_batched_tokens=16)
    first, second = make_seq("a", 24), make_seq("b", 40)
    sim.add(first)
    sim.add(second)
    firsts = []
    while not (first.num_output_tokens and second.num_output_tokens):
        sim.submit()
        firsts += [
            u.sequence.request_id for u in sim.complete() if u.new_token_ids and u.sequence.num_output_tokens == 1
        ]
    assert firsts == ["a", "b"]


def test_of_prompts_begun_the_highest_rank_takes_the_budget() -> None:
    sim = make_sim(num_stages=2, max_num_seqs=8, max_num_batched_tokens=16)
    sim.add(make_seq("low", 40))
    sim.submit()
    sim.add(make_seq("high", 40, priority=-1), make_seq("x", 40), make_seq("y", 40))
    assert rows(sim, sim.submit()) == ["high"]
    sim.complete()
    sim.complete()
    # "low" has been ready for longer.
    assert rows(sim, sim.submit()) == ["high"]
    assert rows(sim, sim.submit()) == ["low"]


def test_no_decode_waits_while_prompts_keep_coming() -> None:
    sim = make_sim(num_stages=2, max_num_seqs=8, max_num_batched_tokens=16)
    decode = make_seq("d", 2, max_tokens=60)
    sim.add(decode)
    num_steps_without = 0
    for i in range(100):
        if i < 60:
            sim.add(make_seq(f"p{i}", 24, max_tokens=1))
        fill(sim)
        tokens_before = decode.num_output_tokens
        sim.complete()
        num_steps_without = 0 if decode.num_output_tokens > tokens_before else num_steps_without + 1
        if decode.is_finished:
            break
        assert num_steps_without <= 2
    assert decode.is_finished


def test_a_prompt_begun_is_not_pushed_aside_by_decodes_though_the_pipeline_is_never_full() -> None:
    # The caller completes each step before it asks for the next: two decodes could take every turn.
    sim = make_sim(num_stages=2)
    prompt = make_seq("p", 400, priority=1)
    sim.add(prompt)
    sim.submit()
    sim.add(make_seq("a", 2, max_tokens=100), make_seq("b", 2, max_tokens=100))
    sim.submit()
    for _ in range(40):
        sim.complete()
        sim.submit()
    assert prompt.first_token_time is not None


def test_priority_then_arrival_decide_who_is_admitted() -> None:
    sim = make_sim(max_num_seqs=1)
    for name, priority in (("b", 1), ("a", 0), ("c", 1), ("z", -5)):
        sim.add(make_seq(name, 4, priority=priority, max_tokens=1))
    order = []
    while not sim.scheduler.is_idle:
        order += rows(sim, sim.submit())
        sim.complete()
    assert order == ["z", "a", "b", "c"]


def test_nobody_overtakes_the_first_that_does_not_fit() -> None:
    sim = make_sim(num_blocks=10)
    sim.add(make_seq("a", 20, max_tokens=8))
    fill(sim)
    sim.add(make_seq("big", 24, max_tokens=1))
    sim.add(make_seq("small", 4, max_tokens=1))
    sim.complete()
    assert rows(sim, sim.submit()) == ["a"]
    sim.drain(50)
    finished = sorted(sim.sequences, key=lambda s: s.finish_time or 0)
    assert [s.request_id for s in finished] == ["a", "big", "small"]


def test_admission_leaves_a_block_for_each_running_sequence() -> None:
    sim = make_sim(num_blocks=4)
    sim.add(make_seq("a", 8, max_tokens=2))
    fill(sim)
    sim.add(make_seq("b", 8, max_tokens=2))
    sim.complete()
    # Two blocks are free and b needs two, but then a could not go on.
    assert rows(sim, sim.submit()) == ["a"]
    sim.drain(10)
    assert sim.scheduler.stats().num_preemptions == 0


def test_a_prompt_in_the_prefix_cache_is_admitted_to_a_full_pipeline_with_little_memory() -> None:
    sim = make_sim(num_stages=2, num_blocks=16)
    long = [1] * 33
    sim.add(make_seq("long", long, max_tokens=30))
    fill(sim)
    sim.complete()
    sim.add(make_seq("other", 3, max_tokens=30))
    # Nine blocks without the cache, one with it: it must not wait for "long" to end.
    sim.add(make_seq("same", long, max_tokens=4))
    for _ in range(12):
        fill(sim)
        sim.complete()
    same = sim.sequences[2]
    assert same.is_finished
    assert same.num_cached_tokens == 32
    assert not sim.sequences[0].is_finished
