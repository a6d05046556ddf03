"""A sequence's way through the scheduler, from refusal or admission to its last token."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from scheduler_cases import DEFAULTS, make_seq, make_sim
from scheduler_sim import EOS, digest_of, reference

from flexpipe_serve.engine.scheduler import Scheduler
from flexpipe_serve.errors import ConfigError, InvalidRequestError, QueueFullError
from flexpipe_serve.pipeline.messages import decode_header, decode_step


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
