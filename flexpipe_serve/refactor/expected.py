"""What a stage will say of its memory that does not run yet: pure code."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from flexpipe_serve.model.weight_sizes import WeightSizes
from flexpipe_serve.pipeline.stage_types import StageReport, stage_domain
from flexpipe_serve.placement.topology import Topology


def expect_report(name: str, *, node: str, reports: Collection[StageReport], topology: Topology) -> StageReport:
    """The report of an empty stage on ``node``, from those that run.

    Its process is assumed to take as much as the largest of theirs. Free memory is what a stage on that node measured.
    Where none stands there yet, it is assumed: of a node's RAM what Ray may give out there (its resource ``memory``:
    what was free when Ray started), of a GPU what one of ours would have free without its stage, as if all GPUs were
    alike. Once a stage is there, the next plan goes by what it measures.

    Args:
        reports: of all stages that run; at least one.
    """
    neighbours = [report for report in reports if report.node == node]
    like = next(iter(neighbours or reports))
    if neighbours:
        free_bytes = like.domain_free_bytes
    elif like.device == "cpu":
        free_bytes = sum(device.free_bytes for device in topology.devices if device.node == node)
    else:
        free_bytes = like.domain_free_bytes + like.weights_bytes + like.overhead_bytes + like.kv_bytes
    return replace(
        like,
        name=name,
        node=node,
        domain=stage_domain(like.setup, name=name, node=node, device=like.device),
        domain_free_bytes=free_bytes,
        weight_sizes=WeightSizes(),
        kv_bytes=0,
        overhead_bytes=max(report.overhead_bytes for report in reports),
    )
