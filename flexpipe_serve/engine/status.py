"""What a server tells of itself: the body of ``GET /flexpipe/status``, and its events."""

from __future__ import annotations

import msgspec

from flexpipe_serve.metrics import MetricsSnapshot
from flexpipe_serve.placement.host_cache_use import HostCacheUse


class StageStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One stage."""

    name: str
    node: str
    """Its id."""
    pid: int
    device: str
    compute: str
    """What computes: stages with the same one take turns, others work at the same time."""
    speed: float
    """Of that, in units of the whole node's cores or of the GPU."""
    is_emulated: bool
    """It computes for a share of the time only, as a slower device would."""
    layers: tuple[int, int]
    """First layer, and first layer behind."""
    num_layers: int
    weights_bytes: int
    overhead_bytes: int
    kv_bytes: int
    host_cache: HostCacheUse | None
    """Of its node; None: there is none."""
    num_steps: int
    busy_seconds: float


class LayoutStatus(msgspec.Struct, frozen=True, kw_only=True):
    """How the layers are split. All 0 before the pipeline is up for the first time."""

    num_layers: int
    num_stages: int
    boundaries: tuple[int, ...]
    """First layer of each later stage."""


class KVStatus(msgspec.Struct, frozen=True, kw_only=True):
    """KV capacity, in blocks of ``block_size`` tokens."""

    block_size: int
    num_blocks: int
    num_used_blocks: int
    """By sequences."""
    num_cached_blocks: int
    """Of the prefix cache, used by no sequence."""
    num_free_blocks: int
    max_tokens: int
    """That all blocks hold."""
    use: float
    """Share of the blocks that sequences hold."""


class QueueStatus(msgspec.Struct, frozen=True, kw_only=True):
    """Sequences, and steps on their way."""

    num_running: int
    num_waiting: int
    num_steps_in_flight: int
    num_preemptions: int
    """Since the start."""


class PrefixCacheStatus(msgspec.Struct, frozen=True, kw_only=True):
    """Since the start."""

    num_prompt_tokens: int
    num_hit_tokens: int


class NodeStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A node that lives, or that a stage stands on."""

    id: str
    address: str
    rack: str
    zone: str
    alive: bool
    draining: bool
    stages: tuple[str, ...]
    """Names of those that stand on it."""


class PipelineStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One pipeline."""

    pipeline: int
    """Its number."""
    state: str
    """'serving' or 'unavailable'."""
    reason: str | None
    """Why it is unavailable."""
    epoch: int
    """Number of the layout in force."""
    layout: LayoutStatus
    stages: tuple[StageStatus, ...]
    """In pipeline order."""
    warm_stages: tuple[StageStatus, ...]
    """Without a part in the layout."""
    kv: KVStatus
    queue: QueueStatus
    prefix_cache: PrefixCacheStatus
    metrics: MetricsSnapshot
    nodes: tuple[NodeStatus, ...]


class ServerStatus(PipelineStatus, frozen=True, kw_only=True):
    """The body of ``GET /flexpipe/status``: the first pipeline, the nodes of all, and under ``pipelines`` each one."""

    model: str
    """Its name over HTTP."""
    config_error: str | None
    """Why a layout of the ``user_config`` cannot be had."""
    pipelines: tuple[PipelineStatus, ...]


class Event(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Something that happened."""

    time: float
    """Unix time."""
    kind: str
    message: str
    pipeline: int | None = None
    """Number of the pipeline it happened to, where that is not the first one."""
