"""The KV cache shrinks and grows while sequences run: copies in the steps, who waits, and what stays as it was."""

from __future__ import annotations

import pytest
from scheduler_cases import fill, make_seq, make_sim, rows
from scheduler_sim import Simulation, reference

from flexpipe_serve.engine.request import SequenceStatus
from flexpipe_serve.errors import InvalidRequestError, RefactorRefusedError
from flexpipe_serve.pipeline.messages import StepBatch, decode_header, decode_step


def run_until_shrunk(sim: Simulation) -> list[StepBatch]:
    batches = []
    while not sim.scheduler.is_shrunk:
        batches += fill(sim)
        sim.complete()
        sim.scheduler.check_integrity()
    sim.decommit()
    return batches


def high_sim(num_high: int = 12, *, num_stages: int = 1) -> Simulation:
    """A sequence "long" that holds ``num_high`` blocks from 12 on; those below are free, and no step is in flight."""
    sim = make_sim(num_stages=num_stages, num_blocks=48, prefix_cache=False, max_num_batched_tokens=256)
    sim.add(make_seq("gone", 47, max_tokens=1), make_seq("long", 4 * num_high - 1, max_tokens=40))
    for _ in fill(sim):
        sim.complete()
    assert sim.scheduler.blocks_in_use().tolist() == list(range(12, 12 + num_high))
    return sim


def assert_as_without(sim: Simulation, max_len: int = 512) -> None:
    for seq in sim.sequences:
        assert sim.outputs[seq] == reference(seq.prompt_token_ids, seq.params, seq.index, max_len)[0]


# ---------------------------------------------------------------- copies


def test_copies_ride_in_steps_a_few_at_a_time_and_the_sequence_goes_on() -> None:
    sim = high_sim(12)
    sim.scheduler.shrink(24)
    # Blocks 12 to 23 are below the limit: nothing has to move.
    assert sim.scheduler.is_shrunk
    sim.scheduler.shrink(13)
    first, second = run_until_shrunk(sim)
    assert [len(batch.header.copies) for batch in (first, second)] == [8, 3]
    assert (first.header.num_seqs, second.header.num_seqs) == (1, 1)
    assert sim.pipeline.num_blocks == 13
    assert sim.scheduler.blocks_in_use().max() < 13
    assert sim.scheduler.stats().num_preemptions == 0
    sim.grow(48)
    sim.drain(60)
    assert_as_without(sim)


def test_a_step_uses_the_blocks_that_it_moves_to() -> None:
    sim = high_sim(2)
    sim.scheduler.shrink(6)
    batch = sim.submit()
    assert batch is not None
    assert batch.header.copies == ((12, 0), (13, 1))
    assert batch.block_tables.tolist() == [[0, 1]]
    assert not sim.scheduler.is_shrunk  # the copies are in flight
    sim.complete()
    assert sim.scheduler.is_shrunk


def test_blocks_of_a_sequence_in_flight_move_in_a_step_behind_it() -> None:
    sim = high_sim(2, num_stages=2)
    (flying,) = fill(sim)
    assert flying.block_tables.tolist() == [[12, 13]]
    sim.scheduler.shrink(6)
    (copying,) = fill(sim)
    assert (copying.header.num_seqs, copying.header.copies) == (0, ((12, 0), (13, 1)))
    sim.complete()
    assert not sim.scheduler.is_shrunk
    (after,) = fill(sim)
    assert after.block_tables[0, :2].tolist() == [0, 1]
    assert sim.complete() == []
    assert sim.scheduler.is_shrunk
    sim.decommit()
    sim.grow(48)
    sim.drain(60)
    assert_as_without(sim)


def test_a_step_of_copies_alone_survives_the_wire() -> None:
    sim = make_sim(num_blocks=9)
    sim.add(make_seq("a", 17, max_tokens=1), make_seq("b", 13, max_tokens=1))
    sim.drain(3)
    assert sim.scheduler.is_idle
    sim.scheduler.shrink(6)
    (batch,) = fill(sim)
    frames = [bytes(frame) for frame in batch.encode()]
    header = decode_header(frames[0])
    decoded = decode_step(header, frames[1:])  # type: ignore[arg-type]
    assert decoded.header == batch.header
    assert batch.header.copies
    assert (batch.header.num_seqs, batch.header.num_tokens, batch.header.table_width) == (0, 0, 0)
    assert decoded.block_tables.shape == (0, 0)
    assert sim.complete() == []
    assert sim.scheduler.is_shrunk


def test_the_prefix_cache_survives_as_far_as_there_is_room() -> None:
    sim = make_sim(num_blocks=16)
    old, new = [1] * 24, [2] * 24
    for name, prompt in (("old", old), ("new", new)):
        sim.add(make_seq(name, prompt, max_tokens=1))
        sim.drain(2)
    sim.scheduler.shrink(8)
    run_until_shrunk(sim)
    sim.add(make_seq("new again", new, max_tokens=1))
    sim.drain(2)
    sim.add(make_seq("old again", old, max_tokens=1))
    sim.drain(2)
    # Two blocks of the older prompt had room; one made way for the last tokens of "new again".
    assert [seq.num_cached_tokens for seq in sim.sequences] == [0, 0, 20, 4]
    assert_as_without(sim)


def test_shared_blocks_move_for_all_that_share_them() -> None:
    sim = make_sim(num_blocks=40, num_stages=2)
    sim.add(make_seq("gone", 32, max_tokens=1))
    fill(sim)
    sim.add(*(make_seq("n", [i % 5 for i in range(21)], index=i, max_tokens=20) for i in range(3)))
    for _ in range(6):
        fill(sim)
        sim.complete()
    sim.scheduler.shrink(sim.scheduler.stats().num_used_blocks + 4)
    assert sum(len(batch.header.copies) for batch in run_until_shrunk(sim)) > 3
    sim.drain(100)
    assert_as_without(sim)


def test_the_copies_of_a_failed_step_count_as_made() -> None:
    sim = high_sim(3)
    sim.scheduler.shrink(9)
    batch = sim.submit()
    assert batch is not None
    assert len(batch.header.copies) == 3
    (update,) = sim.fail(0)
    assert update.sequence.status is SequenceStatus.WAITING
    assert sim.scheduler.is_shrunk
    sim.scheduler.check_integrity()
    sim.decommit()
    sim.grow(48)
    sim.drain(60)
    assert_as_without(sim)


def test_reset_forgets_the_shrink_and_its_copies() -> None:
    sim = high_sim(12)
    sim.scheduler.shrink(13)
    batch = sim.submit()
    assert batch is not None
    assert sim.reset(20) == []
    assert sim.scheduler.is_shrunk
    assert sim.scheduler.max_len == 80
    assert sim.scheduler.complete(batch.header.step, [0], now=0.0) == []
    sim.scheduler.check_integrity()
    sim.drain(60)


def test_patched_through_goes_into_the_header() -> None:
    sim = make_sim()
    sim.add(make_seq("a"))
    batch = sim.scheduler.schedule(step=0, epoch=1, num_stages=1, now=0.0, patched_through=41)
    assert batch is not None
    assert batch.header.patched_through == 41


# ---------------------------------------------------------------- refusal and return


def test_a_shrink_below_what_is_in_use_is_refused_and_changes_nothing() -> None:
    sim = high_sim(12)
    before = sim.scheduler.stats()
    with pytest.raises(RefactorRefusedError, match="to 11 blocks: 12 are in use"):
        sim.scheduler.shrink(11)
    assert sim.scheduler.stats() == before
    assert sim.scheduler.is_shrunk
    sim.drain(60)


def test_a_shrink_can_be_taken_back_while_its_copies_are_in_flight() -> None:
    sim = high_sim(12, num_stages=3)
    sim.scheduler.shrink(13)
    moved_from = {source for batch in fill(sim) for source, _ in batch.header.copies}
    assert len(moved_from) == 11
    assert sim.grow(48) == []
    sim.add(make_seq("new", 100, max_tokens=3))
    while not sim.scheduler.is_idle:
        for batch in fill(sim):
            assert not batch.header.copies
        sim.complete()
        sim.scheduler.check_integrity()
    assert sim.scheduler.stats().num_free_blocks == 48
    assert_as_without(sim, 192)


def test_the_blocks_needed_are_those_in_use_or_what_the_longest_may_need() -> None:
    sim = make_sim(num_blocks=40, max_model_len=100)
    assert sim.scheduler.num_blocks_needed == 1
    sim.add(make_seq("a", 8, max_tokens=9), make_seq("b", 2, max_tokens=3))
    assert sim.scheduler.num_blocks_needed == 5
    sim.add(make_seq("c", 8, max_tokens=5000))
    assert sim.scheduler.num_blocks_needed == 25
    sim = make_sim(num_blocks=40, max_num_batched_tokens=256)
    for i in range(4):
        sim.add(make_seq(f"d{i}", 32, max_tokens=2))
    assert sim.scheduler.num_blocks_needed == 9
    fill(sim)
    assert sim.scheduler.num_blocks_needed == sim.scheduler.stats().num_used_blocks == 32


# ---------------------------------------------------------------- who waits


def test_a_request_too_long_for_the_shrunk_cache_waits_and_others_overtake_it() -> None:
    sim = make_sim(num_blocks=30)
    sim.scheduler.shrink(8)
    assert sim.scheduler.max_len == 120
    long, short = make_seq("long", 60, max_tokens=20), make_seq("short", 8, max_tokens=4)
    sim.add(long)
    sim.add(short)
    assert rows(sim, sim.submit()) == ["short"]
    sim.complete()
    while not short.is_finished:
        fill(sim)
        sim.complete()
    assert sim.submit() is None
    assert long.status is SequenceStatus.WAITING
    assert sim.grow(30) == []
    sim.drain(30)
    assert_as_without(sim, 120)


def test_a_running_sequence_that_outgrows_the_shrunk_cache_waits_and_ends_as_without() -> None:
    sim = make_sim(num_blocks=30)
    long, late = make_seq("long", 12, max_tokens=60), make_seq("late", 4, max_tokens=4)
    sim.add(long)
    fill(sim)
    sim.complete()
    sim.scheduler.shrink(5)
    sim.decommit()
    while sim.submit() is not None:
        sim.complete()
    # All 20 places are taken, and there is a token more to compute.
    assert (len(long.tokens), long.status, long.num_preemptions) == (21, SequenceStatus.WAITING, 1)
    sim.add(late)
    while not late.is_finished:
        assert sim.submit() is not None
        sim.complete()
    sim.grow(30)
    sim.drain(80)
    assert long.finish_reason == "length"
    assert_as_without(sim, 120)


def test_too_few_blocks_for_all_preempt_as_ever() -> None:
    sim = make_sim(num_blocks=60, num_stages=2)
    for i in range(4):
        sim.add(make_seq(f"s{i}", 20, max_tokens=30))
    for _ in range(8):
        fill(sim)
        sim.complete()
    sim.scheduler.shrink(sim.scheduler.stats().num_used_blocks + 1)
    run_until_shrunk(sim)
    sim.drain(400)
    assert sim.scheduler.stats().num_preemptions > 0
    assert_as_without(sim)


def test_growth_to_less_than_before_makes_the_shrink_final() -> None:
    sim = make_sim(num_blocks=30, num_stages=2)
    long, unstarted = make_seq("long", 12, max_tokens=60), make_seq("new", 60)
    sim.add(long)
    fill(sim)
    sim.complete()
    sim.scheduler.shrink(5)
    sim.add(unstarted)
    while fill(sim):
        sim.complete()
    assert (len(long.tokens), long.is_finished) == (21, False)
    assert sim.grow(5) == [long, unstarted]
    assert (long.finish_reason, unstarted.finish_reason) == ("length", "error")
    assert sim.scheduler.max_len == 20
    with pytest.raises(InvalidRequestError, match="20 tokens; at most 19 fit"):
        sim.add(make_seq("later", 20))
    assert sim.scheduler.is_idle


def test_a_sequence_in_flight_that_the_final_size_is_too_small_for_ends_with_its_step() -> None:
    sim = make_sim(num_blocks=30)
    seq = make_seq("a", 12, max_tokens=60)
    sim.add(seq)
    fill(sim)
    sim.complete()
    sim.scheduler.shrink(5)
    while len(seq.tokens) < 20:
        fill(sim)
        sim.complete()
    fill(sim)
    assert sim.grow(5) == []
    (update,) = sim.complete()
    assert (update.finished, update.new_token_ids, seq.finish_reason) == (True, (), "length")
    assert sim.outputs[seq] == reference(seq.prompt_token_ids, seq.params, 0, 20)[0]
