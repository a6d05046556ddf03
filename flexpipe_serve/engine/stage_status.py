"""A stage in the status."""

from __future__ import annotations

from typing import Any
from dataclasses import asdict

from flexpipe_serve.pipeline.stage_types import StageReport


def describe_stage(report: StageReport) -> dict[str, Any]:
    """The stage's entry in ``GET /flexpipe/status``."""
    return {
        "name": report.name,
        "node": report.node,
        "pid": report.pid,
        "device": report.device,
        "compute": report.compute,
        "speed": round(report.speed, 4),
        "is_emulated": report.setup.cpu_share < 1,
        "layers": [report.start, report.stop],
        "num_layers": report.stop - report.start,
        "weights_bytes": report.weights_bytes,
        "overhead_bytes": report.overhead_bytes,
        "kv_bytes": report.kv_bytes,
        "host_cache": None if report.host_cache is None else asdict(report.host_cache),
        "num_steps": report.num_steps,
        "busy_seconds": round(report.busy_seconds, 3),
    }
