"""The pipeline as the planner sees it: which devices there are, and how the layers lie on them. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from flexpipe_serve.engine.scheduler_config import SchedulerStats
from flexpipe_serve.pipeline.layout import Layout
from flexpipe_serve.pipeline.stage_types import StageReport
from flexpipe_serve.planner.types import SchedulerLimits, Split, StageDevice


@dataclass(frozen=True, kw_only=True)
class PipelineView:
    """What a decision starts from."""

    split: Split
    devices: tuple[StageDevice, ...]
    num_waiting: int
    num_running: int
    num_kv_tokens_in_use: int
    num_kv_tokens: int
    num_prompt_tokens: int
    """Since the start."""
    num_prefix_hit_tokens: int
    is_changing: bool
    """A refactoring runs: nothing is to be decided."""
    limits: SchedulerLimits = field(default_factory=SchedulerLimits)
    """Of each pipeline."""


def device_of(report: StageReport, *, memory_bytes: int) -> StageDevice:
    """The device that a stage stands on; stages with a domain and a compute in common stand on the same one."""
    return StageDevice(
        name=report.domain if report.domain == report.compute else f"{report.domain}@{report.compute}",
        node=report.node,
        compute=report.compute,
        domain=report.domain,
        memory_bytes=memory_bytes,
        overhead_bytes=report.overhead_bytes,
        speed=report.speed,
    )


def devices_of(reports: Iterable[StageReport], budgets: Mapping[str, int]) -> dict[str, StageDevice]:
    """The device of each stage, by the stage's name. A device's overhead is that of its largest stage.

    Args:
        budgets: bytes by domain; stages whose domain has none yet are left out.
    """
    devices = {r.name: device_of(r, memory_bytes=budgets[r.domain]) for r in reports if r.domain in budgets}
    largest: dict[str, StageDevice] = {}
    for device in devices.values():
        if device.name not in largest or device.overhead_bytes > largest[device.name].overhead_bytes:
            largest[device.name] = device
    return {name: largest[device.name] for name, device in devices.items()}


def distinct(devices: Iterable[StageDevice]) -> tuple[StageDevice, ...]:
    """Each device once, in the order they come."""
    return tuple({device.name: device for device in devices}.values())


def join_views(views: Sequence[PipelineView]) -> PipelineView:
    """One view of several pipelines, at least one. The first one's cuts stand for all; a device has the budgets that
    they have of it together."""
    if len(views) == 1:
        return views[0]
    memory: dict[str, int] = {}
    for view in views:
        for device in distinct(view.split.devices):
            memory[device.name] = memory.get(device.name, 0) + device.memory_bytes

    def joined(devices: Iterable[StageDevice]) -> tuple[StageDevice, ...]:
        return tuple(
            msgspec.structs.replace(device, memory_bytes=memory.get(device.name, device.memory_bytes))
            for device in devices
        )

    return PipelineView(
        split=Split(
            boundaries=views[0].split.boundaries,
            devices=joined(device for view in views for device in view.split.devices),
            num_pipelines=len(views),
        ),
        devices=distinct(joined(device for view in views for device in view.devices)),
        num_waiting=sum(view.num_waiting for view in views),
        num_running=sum(view.num_running for view in views),
        num_kv_tokens_in_use=sum(view.num_kv_tokens_in_use for view in views),
        num_kv_tokens=sum(view.num_kv_tokens for view in views),
        num_prompt_tokens=sum(view.num_prompt_tokens for view in views),
        num_prefix_hit_tokens=sum(view.num_prefix_hit_tokens for view in views),
        is_changing=any(view.is_changing for view in views),
        limits=views[0].limits,
    )


def own_computes(splits: Sequence[Split]) -> list[bool]:
    """Of each pipeline, whether no other one computes where it does."""
    computes = [{device.compute for device in split.devices} for split in splits]
    num_sharing = Counter(compute for each in computes for compute in each)
    return [all(num_sharing[compute] == 1 for compute in each) for each in computes]


def nodes_of(split: Split, *, known: Iterable[str]) -> tuple[str, ...] | None:
    """The node of each stage of ``split``, of several pipelines of the first; None where there is one node only.

    Args:
        known: the nodes that there are.
    """
    nodes = tuple(device.node for device in split.devices[: split.num_stages])
    return None if {*known} == {*nodes} and len({*nodes}) == 1 else nodes


def make_view(
    *,
    layout: Layout,
    reports: Mapping[str, StageReport],
    budgets: Mapping[str, int],
    stats: SchedulerStats,
    block_size: int,
    is_changing: bool,
    limits: SchedulerLimits,
    usable: Iterable[StageDevice] = (),
) -> PipelineView | None:
    """The view of a pipeline.

    Args:
        reports: of all stages alive, by name.
        budgets: bytes by domain.
        stats: of its scheduler.
        usable: devices of the cluster. Those of nodes that have stages are known from their reports; the others are
            taken to get the largest budget and to need the largest overhead that is seen here, where they have room.

    Returns:
        None where a stage of the layout has not reported yet.
    """
    devices = devices_of(reports.values(), budgets)
    if not devices.keys() >= set(layout.stages):
        return None
    nodes = {device.node for device in devices.values()}
    overhead = max(device.overhead_bytes for device in devices.values())
    elsewhere = (
        msgspec.structs.replace(
            device, memory_bytes=min(device.memory_bytes, max(budgets.values())), overhead_bytes=overhead
        )
        for device in usable
        if device.node not in nodes and device.memory_bytes > 0
    )
    split = Split(boundaries=layout.boundaries, devices=tuple(devices[name] for name in layout.stages))
    return PipelineView(
        split=split,
        devices=distinct((*split.devices, *devices.values(), *elsewhere)),
        num_waiting=stats.num_waiting,
        num_running=stats.num_running,
        num_kv_tokens_in_use=stats.num_used_blocks * block_size,
        num_kv_tokens=stats.num_blocks * block_size,
        num_prompt_tokens=stats.num_prompt_tokens,
        num_prefix_hit_tokens=stats.num_prefix_hit_tokens,
        is_changing=is_changing,
        limits=limits,
    )
