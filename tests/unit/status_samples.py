"""A server's status, for tests that look at some of it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import msgspec

from flexpipe_serve.engine.status import (
    KVStatus,
    LayoutStatus,
    NodeStatus,
    PipelineStatus,
    PrefixCacheStatus,
    QueueStatus,
    ServerStatus,
    StageStatus,
)
from flexpipe_serve.metrics import MetricsSnapshot


def stage(name: str = "stage-0", **fields: Any) -> StageStatus:
    values: dict[str, Any] = {
        "name": name, "node": "n", "pid": 1, "device": "cpu", "compute": "n/cpu", "speed": 1.0, "is_emulated": False,
        "layers": (0, 0), "num_layers": 0, "weights_bytes": 0, "overhead_bytes": 0, "kv_bytes": 0, "host_cache": None,
        "num_steps": 0, "busy_seconds": 0.0,
    }  # fmt: skip
    return StageStatus(**{**values, **fields})


def node(name: str, **fields: Any) -> NodeStatus:
    values: dict[str, Any] = {
        "address": "10.0.0.1", "rack": "", "zone": "z1", "alive": True, "draining": False, "stages": (),
    }  # fmt: skip
    return NodeStatus(id=name, **{**values, **fields})


def pipeline_status(
    boundaries: Sequence[int] = (),
    *,
    num_layers: int = 30,
    stages: Sequence[StageStatus] | None = None,
    kv: dict[str, Any] | None = None,
    queue: dict[str, Any] | None = None,
    **fields: Any,
) -> PipelineStatus:
    """A pipeline with these boundaries and, where ``stages`` are not given, stages with nothing but layers."""
    if stages is None:
        cuts = pairwise((0, *boundaries, num_layers))
        stages = [stage(f"stage-{i}", layers=(a, b), num_layers=b - a) for i, (a, b) in enumerate(cuts)]
    none = dict.fromkeys(("num_blocks", "num_used_blocks", "num_cached_blocks", "num_free_blocks", "max_tokens"), 0)
    idle = dict.fromkeys(("num_running", "num_waiting", "num_steps_in_flight", "num_preemptions"), 0)
    values: dict[str, Any] = {
        "pipeline": 0, "state": "serving", "reason": None, "epoch": 1, "warm_stages": (), "nodes": (),
        "metrics": MetricsSnapshot(counters={}, latencies={}),
        "prefix_cache": PrefixCacheStatus(num_prompt_tokens=0, num_hit_tokens=0),
    }  # fmt: skip
    return PipelineStatus(
        layout=LayoutStatus(num_layers=num_layers, num_stages=len(boundaries) + 1, boundaries=tuple(boundaries)),
        stages=tuple(stages),
        kv=KVStatus(**{"block_size": 16, "use": 0.0, **none, **(kv or {})}),
        queue=QueueStatus(**{**idle, **(queue or {})}),
        **{**values, **fields},
    )


def server_status(*pipelines: PipelineStatus, **fields: Any) -> ServerStatus:
    """A server's with these pipelines, or with one of a single stage."""
    pipelines = pipelines or (pipeline_status(),)
    values = {"model": "m", "config_error": None, "pipelines": pipelines, **fields}
    return ServerStatus(**{**msgspec.structs.asdict(pipelines[0]), **values})
