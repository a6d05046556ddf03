"""Pipelines and stages in the status."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import msgspec

from flexpipe_serve.engine.scheduler_config import SchedulerStats
from flexpipe_serve.engine.status import (
    KVStatus,
    LayoutStatus,
    NodeStatus,
    PipelineStatus,
    PrefixCacheStatus,
    QueueStatus,
    StageStatus,
)
from flexpipe_serve.metrics import MetricsSnapshot
from flexpipe_serve.pipeline.layout import Layout
from flexpipe_serve.pipeline.stage_types import StageReport
from flexpipe_serve.placement.topology import Topology


def describe_stage(report: StageReport) -> StageStatus:
    """The stage's part."""
    return StageStatus(
        name=report.name,
        node=report.node,
        pid=report.pid,
        device=report.device,
        compute=report.compute,
        speed=round(report.speed, 4),
        is_emulated=report.setup.cpu_share < 1,
        layers=(report.start, report.stop),
        num_layers=report.stop - report.start,
        weights_bytes=report.weights_bytes,
        overhead_bytes=report.overhead_bytes,
        kv_bytes=report.kv_bytes,
        host_cache=report.host_cache,
        num_steps=report.num_steps,
        busy_seconds=round(report.busy_seconds, 3),
    )


def describe_nodes(topology: Topology | None, node_of: Mapping[str, str]) -> tuple[NodeStatus, ...]:
    """The nodes that live, or that a stage stands on.

    Args:
        topology: None: not known yet.
        node_of: the node of each stage, by name.
    """
    nodes = topology.nodes if topology is not None else ()
    return tuple(
        NodeStatus(
            id=node.name,
            address=node.address,
            rack=node.rack,
            zone=node.zone,
            alive=node.is_alive,
            draining=node.is_draining,
            stages=tuple(name for name, its_node in node_of.items() if its_node == node.name),
        )
        for node in nodes
        if node.is_alive or node.name in node_of.values()
    )


def merge_nodes(of_pipelines: Iterable[Sequence[NodeStatus]]) -> tuple[NodeStatus, ...]:
    """The nodes with the stages of all pipelines.

    Args:
        of_pipelines: what ``describe_nodes`` gives for each.
    """
    merged: dict[str, NodeStatus] = {}
    for nodes in of_pipelines:
        for node in nodes:
            former = merged[node.id].stages if node.id in merged else ()
            merged[node.id] = msgspec.structs.replace(node, stages=former + node.stages)
    return tuple(merged.values())


def describe_pipeline(
    *,
    number: int,
    layout: Layout | None,
    epoch: int,
    reports: Mapping[str, StageReport],
    stats: SchedulerStats,
    block_size: int,
    unavailable: str | None,
    metrics: MetricsSnapshot,
    nodes: tuple[NodeStatus, ...],
) -> PipelineStatus:
    """The pipeline's part.

    Args:
        reports: the latest of its stages, by name.
        unavailable: why it cannot serve now; None: it serves.
    """
    stages = layout.stages if layout else ()
    return PipelineStatus(
        pipeline=number,
        state="serving" if unavailable is None else "unavailable",
        reason=unavailable,
        epoch=epoch,
        layout=LayoutStatus(
            num_layers=layout.num_layers if layout else 0,
            num_stages=layout.num_stages if layout else 0,
            boundaries=layout.boundaries if layout else (),
        ),
        stages=tuple(describe_stage(reports[name]) for name in stages if name in reports),
        warm_stages=tuple(describe_stage(report) for name, report in reports.items() if name not in stages),
        kv=KVStatus(
            block_size=block_size,
            num_blocks=stats.num_blocks,
            num_used_blocks=stats.num_used_blocks,
            num_cached_blocks=stats.num_cached_blocks,
            num_free_blocks=stats.num_free_blocks,
            max_tokens=stats.num_blocks * block_size,
            use=round(stats.num_used_blocks / max(1, stats.num_blocks), 4),
        ),
        queue=QueueStatus(
            num_running=stats.num_running,
            num_waiting=stats.num_waiting,
            num_steps_in_flight=stats.num_steps_in_flight,
            num_preemptions=stats.num_preemptions,
        ),
        prefix_cache=PrefixCacheStatus(
            num_prompt_tokens=stats.num_prompt_tokens, num_hit_tokens=stats.num_prefix_hit_tokens
        ),
        metrics=metrics,
        nodes=nodes,
    )
