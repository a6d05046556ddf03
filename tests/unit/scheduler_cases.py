"""Schedulers and sequences for the tests of the scheduler's rules."""

from __future__ import annotations

import dataclasses
from typing import Any

from scheduler_sim import EOS, Simulation

from flexpipe_serve.engine.request import Sequence
from flexpipe_serve.engine.sampling_params import SamplingParams
from flexpipe_serve.engine.scheduler import Scheduler
from flexpipe_serve.engine.scheduler_config import SchedulerConfig
from flexpipe_serve.pipeline.messages import StepBatch

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
