"""Abort, finish, failed steps, lost KV."""

from __future__ import annotations

import pytest
from scheduler_cases import fill, make_seq, make_sim, rows
from scheduler_sim import digest_of, next_token, reference

from flexpipe_serve.engine.request import Sequence, SequenceStatus
from flexpipe_serve.engine.sampling_params import SamplingParams
from flexpipe_serve.engine.scheduler import Scheduler
from flexpipe_serve.engine.scheduler_config import SchedulerConfig


def test_abort_takes_effect_at_once_or_at_the_step_boundary() -> None:
    sim = make_sim(num_stages=2)
    flying, waiting = make_seq("fly", 8), make_seq("wait", 8)
    sim.add(flying)
    fill(sim)
    sim.add(waiting)
    assert sim.scheduler.abort("wait", now=2.0) == [waiting]
    assert (waiting.finish_reason, waiting.finish_time) == ("abort", 2.0)
    assert sim.scheduler.abort("fly", now=2.0) == []
    assert sim.scheduler.abort("fly", now=2.0) == []
    assert not flying.is_finished
    assert sim.scheduler.stats().num_used_blocks == 2
    (update,) = sim.complete()
    assert (update.sequence, update.new_token_ids, update.finished) == (flying, (), True)
    assert flying.finish_reason == "abort"
    assert sim.scheduler.stats().num_used_blocks == 0
    assert sim.scheduler.abort("fly", now=3.0) == []
    assert sim.scheduler.abort("never heard of", now=3.0) == []
    assert flying.finish_time == sim.now


def test_finish_right_after_complete_frees_the_blocks_and_the_first_reason_counts() -> None:
    sim = make_sim()
    seq = make_seq("a", 8)
    sim.add(seq)
    fill(sim)
    sim.complete()
    sim.scheduler.finish(seq, "stop", "\n\n", now=4.0)
    sim.scheduler.finish(seq, "abort", now=5.0)
    assert (seq.finish_reason, seq.stop_reason, seq.finish_time) == ("stop", "\n\n", 4.0)
    assert sim.scheduler.is_idle
    sim.scheduler.check_integrity()


def test_a_failed_step_is_computed_again_and_others_go_on() -> None:
    sim = make_sim(num_stages=2, max_num_batched_tokens=32)
    a, b = make_seq("a", 8), make_seq("b", 8)
    sim.add(a)
    sim.add(b)
    for _ in range(6):
        fill(sim)
        sim.complete()
    fill(sim)
    before = list(sim.outputs[a])
    assert a.in_flight is not None
    position = [s.batch.header.step for s in sim.pipeline.steps].index(a.in_flight)
    (update,) = sim.fail(position)
    assert (update.sequence, update.new_token_ids, update.finished) == (a, (), False)
    assert (a.status, a.num_computed, a.num_failed_steps) == (SequenceStatus.WAITING, 0, 1)
    assert b.in_flight is not None
    assert a.output_token_ids == before
    sim.drain(50)
    for seq in (a, b):
        assert sim.outputs[seq] == reference(seq.prompt_token_ids, seq.params, 0, 512)[0]


def test_what_a_failed_step_wrote_is_not_shared() -> None:
    sim = make_sim()
    seq = make_seq("a", [1] * 8)
    sim.add(seq)
    sim.submit()
    sim.fail(0)
    sim.add(make_seq("b", [1] * 8))
    batch = sim.submit()
    assert batch is not None
    assert batch.num_computed.tolist() == [0]


def test_aborted_in_a_step_that_fails() -> None:
    sim = make_sim()
    seq = make_seq("a")
    sim.add(seq)
    sim.submit()
    sim.scheduler.abort("a", now=0.0)
    (update,) = sim.fail(0)
    assert update.finished
    assert seq.finish_reason == "abort"
    assert sim.scheduler.is_idle
    sim.scheduler.check_integrity()


def test_reset_replays_everything_from_the_tokens() -> None:
    sim = make_sim(num_stages=2)
    seqs = [make_seq(name, 8) for name in "abc"]
    for seq in seqs:
        sim.add(seq)
    for _ in range(4):
        fill(sim)
        sim.complete()
    fill(sim)
    sim.scheduler.abort("b", now=9.0)
    lost = [s.batch.header for s in sim.pipeline.steps]
    assert sim.reset(100) == [seqs[1]]
    assert seqs[1].finish_reason == "abort"
    stats = sim.scheduler.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_free_blocks, stats.num_blocks) == (0, 2, 100, 100)
    for header in lost:
        assert sim.scheduler.complete(header.step, [0] * len(header.samples), now=9.0) == []
    batch = sim.submit()
    assert batch is not None
    assert batch.num_computed.tolist() == [0]
    assert rows(sim, batch) == ["a"]
    sim.drain(50)
    for seq in (seqs[0], seqs[2]):
        assert sim.outputs[seq] == reference(seq.prompt_token_ids, seq.params, 0, 400)[0]


def test_reset_to_fewer_blocks_ends_what_no_longer_fits() -> None:
    sim = make_sim()
    longest, short, unstarted = make_seq("a", 20, max_tokens=50), make_seq("b", 4), make_seq("c", 60)
    sim.add(longest)
    sim.add(short)
    for _ in range(3):
        fill(sim)
        sim.complete()
    sim.add(unstarted)
    assert sim.reset(4) == [longest, unstarted]
    assert (longest.finish_reason, unstarted.finish_reason) == ("length", "error")
    sim.drain(20)
    assert sim.outputs[short] == reference(short.prompt_token_ids, short.params, 0, 16)[0]


def test_a_wrong_number_of_tokens_is_a_bug_not_an_answer() -> None:
    sim = make_sim()
    sim.add(make_seq("a", 4))
    sim.submit()
    with pytest.raises(AssertionError, match="0 tokens, 1 samples"):
        sim.scheduler.complete(0, [], now=0.0)


def test_the_reference_depends_on_context_seed_and_position() -> None:
    tokens = {next_token(digest_of([c]), s, p) for c in range(4) for s in range(4) for p in range(4)}
    assert len(tokens) > 3


def plain_scheduler(names: str) -> Scheduler:
    config = SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=64, max_waiting=8, max_model_len=64)
    scheduler = Scheduler(config, num_blocks=64, block_size=4)
    for name in names:
        params = SamplingParams(max_tokens=20)
        scheduler.add(Sequence(request_id=name, prompt_token_ids=[ord(name)] * 5, params=params))
    return scheduler


def test_sequences_of_a_failed_step_are_retried_alone() -> None:
    scheduler = plain_scheduler("abc")
    sizes = []
    for step in range(6):
        batch = scheduler.schedule(step=step, epoch=1, num_stages=1, now=0.0)
        assert batch is not None
        sizes.append(batch.header.num_seqs)
        if step == 0:
            scheduler.fail_step(step, now=0.0)
        else:
            scheduler.complete(step, [7] * batch.header.num_seqs, now=0.0)
    assert sizes == [3, 1, 1, 1, 3, 3]
    scheduler.check_integrity()


def test_an_invalid_token_ends_its_own_sequence_only() -> None:
    scheduler = plain_scheduler("ab")
    scheduler.schedule(step=1, epoch=1, num_stages=1, now=0.0)
    first, second = scheduler.complete(1, [-1, 7], now=0.0)
    assert first.finished
    assert first.sequence.finish_reason == "error"
    assert first.new_token_ids == ()
    assert not second.finished
    scheduler.check_integrity()
