"""Fleets over stages in threads."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator
from pathlib import Path

from flexpipe_serve.config import KVConfig, LimitsConfig, ModelConfig, SchedulerArgs, ServeArgs
from flexpipe_serve.engine.assemble import make_engine_maker
from flexpipe_serve.engine.fleet import Fleet
from flexpipe_serve.metrics import EngineMetrics
from flexpipe_serve.pipeline.layout import even_boundaries, make_layout
from flexpipe_serve.pipeline.local_host import LocalStageHost


@contextlib.contextmanager
def running_fleet(
    folder: Path,
    host: LocalStageHost,
    *,
    num_stages: int = 1,
    num_pipelines: int = 1,
    memory_budget: int = 64 << 30,
    max_tokens: int = 65536,
    max_num_seqs: int = 64,
) -> Iterator[Fleet]:
    """A started fleet; everything it held is gone afterwards."""
    args = ServeArgs(
        model=ModelConfig(source=str(folder)),
        memory_budget=memory_budget,  # type: ignore[arg-type]
        kv=KVConfig(block_size=4, max_tokens=max_tokens),
        scheduler=SchedulerArgs(max_num_seqs=max_num_seqs, max_num_batched_tokens=64, steps_in_flight=16),
    )
    maker = make_engine_maker(
        args, host=host, domain_key=uuid.uuid4().hex, device="cpu", num_cores=2, limits=LimitsConfig()
    )
    fleet = Fleet(maker, make_metrics=lambda number: EngineMetrics(app="test", model="test", pipeline=number))
    fleet.set_refactor_limits(max_bytes_per_s=1e9, num_warm_stages=0)
    boundaries = even_boundaries(num_layers=maker.num_layers, num_stages=num_stages)
    fleet.start(make_layout(num_layers=maker.num_layers, boundaries=boundaries), num_pipelines=num_pipelines)
    try:
        yield fleet
    finally:
        fleet.stop()
