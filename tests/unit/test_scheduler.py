"""The scheduler's rules, one example each. Histories of all of them together: test_scheduler_histories.py."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from scheduler_sim import EOS, Simulation, digest_of, next_token, reference

from flexpipe_serve.engine.request import Sequence, SequenceStatus
from flexpipe_serve.engine.sampling_params import SamplingParams
from flexpipe_serve.engine.scheduler import Scheduler
from flexpipe_serve.engine.scheduler_config import SchedulerConfig
from flexpipe_serve.errors import ConfigError, InvalidRequestError, QueueFullError
from flexpipe_serve.pipeline.messages import StepBatch, decode_header, decode_step

DEFAULTS = SchedulerConfig(max_num_seqs=32, max_num_batched_tokens=64, max_waiting=100, max_model_len=512)


def make_sim(*, num_stages: int = 1, num_blocks: int = 512, block_size: int = 4, **config: Any) -> Simulation:
    scheduler = Scheduler(dataclasses.replace(DEFAULTS, **config), num_blocks=num_blocks, block_size=block_size)
    return Simulation(scheduler, num_stages=num_stages, block_size=block_size)


def make_seq(
    request_id: str, prompt: int | list[int] = 8, *, index: int = 0, priority: int = 0, **params: Any
) -> Sequence:
    """A sequence that goes on to max_tokens. A prompt given as a length has tokens of its own, shared with nobody."""
    if isinstance(prompt, int):
        prompt = [1000 + sum(map(ord, request_id))] * prompt
    return Sequence(
        request_id=request_id,
        prompt_token_ids=prompt,
        params=SamplingParams(**{"max_tokens": 8, "ignore_eos": True, **params}),
        index=index,
        priority=priority,
        eos_token_ids=[EOS],
        arrival_time=0.5,
    )


def fill(sim: Simulation) -> list[StepBatch]:
    batches = []
    while (batch := sim.submit()) is not None:
        batches.append(batch)
    return batches


def rows(sim: Simulation, batch: StepBatch | None) -> list[str]:
    assert batch is not None
    return [s.request_id for s in sorted(sim.sequences, key=_name) if s.in_flight == batch.header.step]


def _name(seq: Sequence) -> str:
    return seq.request_id


# ---------------------------------------------------------------- life of one sequence


def test_a_prompt_is_computed_in_chunks_and_only_the_last_one_samples() -> None:
    sim = make_sim(max_num_batched_tokens=40)
    seq = make_seq("a", 100, max_tokens=3)
    sim.add(seq)
    seen = []
    while not sim.scheduler.is_idle:
        batch = sim.submit()
        assert batch is not None
        header = batch.header
        seen.append((int(batch.num_computed[0]), int(batch.num_new[0]), [s.position for s in header.samples]))
        assert header.table_width == -(-(seen[-1][0] + seen[-1][1]) // 4)
        sim.complete()
    assert seen == [(0, 40, []), (40, 40, []), (80, 20, [100]), (100, 1, [101]), (101, 1, [102])]
    assert sim.outputs[seq] == reference(seq.prompt_token_ids, seq.params, 0, 512)[0]
    assert (seq.arrival_time, seq.first_scheduled_time, seq.first_token_time, seq.finish_time) == (0.5, 1, 6, 10)


def test_the_batch_survives_the_wire_and_does_not_alias_the_scheduler() -> None:
    sim = make_sim()
    sim.add(make_seq("a", 9, presence_penalty=0.5, prompt_logprobs=True, num_logprobs=2, logit_bias={7: 1.5}, seed=5))
    batch = sim.submit()
    assert batch is not None
    frames = [bytes(f) for f in batch.encode()]
    sim.complete()
    again = batch.encode()
    assert [bytes(f) for f in again] == frames
    header = decode_header(frames[0])
    decoded = decode_step(header, frames[1:])  # type: ignore[arg-type]
    assert decoded.header == batch.header
    for name in ("token_ids", "num_computed", "num_new", "block_tables", "histories", "targets"):
        assert getattr(decoded, name).tolist() == getattr(batch, name).tolist()
        assert getattr(batch, name).dtype == "int32"
    (sample,) = batch.header.samples
    assert (sample.row, sample.position, sample.seed, sample.num_history, sample.num_prompt) == (0, 9, 5, 9, 9)
    assert sample.logit_bias == ((7, 1.5),)
    assert sample.num_logprobs == 2
    (logprobs,) = batch.header.prompt_logprobs
    assert (logprobs.row, logprobs.num_targets, logprobs.num_logprobs) == (0, 8, 2)


def test_history_is_sent_only_where_a_penalty_needs_it() -> None:
    sim = make_sim()
    sim.add(make_seq("a", 8), make_seq("b", 8, repetition_penalty=1.2))
    for num_known in (8, 9, 10):
        batch = sim.submit()
        assert batch is not None
        assert [(s.num_history, s.num_prompt) for s in batch.header.samples] == [(0, 0), (num_known, 8)]
        assert len(batch.histories) == num_known
        sim.complete()


def test_each_sequence_of_a_request_has_its_own_seed_of_63_bits() -> None:
    sim = make_sim(prefix_cache=False)
    sim.add(*(make_seq("a", 2, index=i, seed=2**63 - 2) for i in range(3)))
    batch = sim.submit()
    assert batch is not None
    assert [s.seed for s in batch.header.samples] == [2**63 - 2, 2**63 - 1, 0]


@pytest.mark.parametrize(
    ("params", "end"),
    [
        ({"ignore_eos": False, "max_tokens": 9, "eos": True}, ("stop", None)),
        ({"ignore_eos": True, "max_tokens": 9, "eos": True}, ("length", None)),
        ({"stop_token_ids": (2,), "max_tokens": 9}, ("stop", 2)),
        ({"stop_token_ids": (2,), "max_tokens": 1}, ("stop", 2)),
        ({"max_tokens": 1}, ("length", None)),
    ],
)
def test_how_a_sequence_ends(params: dict[str, Any], end: tuple[str, int | None]) -> None:
    token = EOS if params.pop("eos", False) else 2
    scheduler = Scheduler(DEFAULTS, num_blocks=9, block_size=4)
    seq = make_seq("a", 3, **params)
    scheduler.add(seq)
    for step in range(params["max_tokens"]):
        if seq.is_finished:
            break
        assert scheduler.schedule(step=step, epoch=0, num_stages=1, now=0.0)
        (update,) = scheduler.complete(step, [token], now=0.0)
        assert update.new_token_ids == (token,)
        assert update.finished == seq.is_finished
    assert (seq.finish_reason, seq.stop_reason) == end
    assert seq.num_output_tokens == (9 if end[0] == "length" and params["max_tokens"] == 9 else 1)
    assert scheduler.stats().num_used_blocks == 0


@pytest.mark.parametrize(("num_blocks", "max_model_len", "limit"), [(100, 20, 20), (3, 512, 12)])
def test_the_context_and_the_kv_cache_bound_the_length(num_blocks: int, max_model_len: int, limit: int) -> None:
    sim = make_sim(num_blocks=num_blocks, max_model_len=max_model_len)
    seq = make_seq("a", 8, max_tokens=1000)
    sim.add(seq)
    sim.drain(100)
    assert seq.finish_reason == "length"
    assert len(seq.tokens) == limit == sim.scheduler.max_len


def test_scoring_a_prompt_samples_nothing() -> None:
    sim = make_sim(max_num_batched_tokens=32, max_model_len=40)
    prompt = [i % 5 for i in range(40)]
    seq = make_seq("a", prompt, max_tokens=0, prompt_logprobs=True)
    sim.add(seq)
    sim.drain(2)
    assert seq.finish_reason == "length"
    assert sim.outputs[seq] == []
    assert sim.prompt_logprobs[seq] == [(digest_of(prompt[:i]), prompt[i]) for i in range(1, 40)]


# ---------------------------------------------------------------- refusals


def test_too_long_prompts_are_refused_with_the_numbers() -> None:
    sim = make_sim(num_blocks=100, max_model_len=20)
    sim.add(make_seq("fits", 19))
    sim.add(make_seq("scoring", 20, max_tokens=0, prompt_logprobs=True))
    with pytest.raises(InvalidRequestError, match=r"20 tokens; at most 19 fit.*max_model_len") as error:
        sim.add(make_seq("a", 20))
    assert (error.value.code, error.value.param) == ("context_length_exceeded", "prompt")
    sim = make_sim(num_blocks=3, max_model_len=100)
    with pytest.raises(InvalidRequestError, match=r"12 tokens; at most 11 fit.*KV cache") as error:
        sim.add(make_seq("a", 12))
    assert (error.value.code, error.value.param) == ("context_length_exceeded", "prompt")
    with pytest.raises(InvalidRequestError, match="no tokens"):
        sim.add(make_seq("a", []))


def test_a_full_queue_refuses_all_sequences_of_a_request_or_none() -> None:
    sim = make_sim(max_num_seqs=2, max_waiting=3)
    sim.add(make_seq("a"), make_seq("b"), make_seq("c"))
    with pytest.raises(QueueFullError, match=r"3 sequences .* 3 more .* limit is 5") as error:
        sim.add(*(make_seq("d", index=i) for i in range(3)))
    assert error.value.retry_after_s >= 1
    assert sim.scheduler.stats().num_waiting == 3
    sim.add(*(make_seq("d", index=i) for i in range(2)))
    with pytest.raises(InvalidRequestError, match="6 sequences"):
        sim.add(*(make_seq("e", index=i) for i in range(6)))
    with pytest.raises(InvalidRequestError, match="'a'"):
        sim.add(make_seq("a"))


def test_limits_that_cannot_work_are_refused() -> None:
    with pytest.raises(ConfigError, match="max_num_batched_tokens is 31"):
        dataclasses.replace(DEFAULTS, max_num_batched_tokens=31)
    with pytest.raises(ConfigError, match="max_num_seqs is 0"):
        dataclasses.replace(DEFAULTS, max_num_seqs=0)


# ---------------------------------------------------------------- what goes into a step


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


# ---------------------------------------------------------------- admission


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


# ---------------------------------------------------------------- prefix cache


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


# ---------------------------------------------------------------- preemption


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


# ---------------------------------------------------------------- abort, finish, failure, reset


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
