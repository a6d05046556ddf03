"""What Router and stages say to each other outside the step stream."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from flexpipe_serve.model.weight_sizes import WeightSizes
from flexpipe_serve.pipeline.channel import CurveKeys, Endpoint
from flexpipe_serve.placement.host_cache_use import HostCacheUse
from flexpipe_serve.placement.topology import DeviceKind, Topology


@dataclass(frozen=True, kw_only=True)
class StageSetup:
    """What a stage process is started with; all of it needs a new process to change."""

    name: str
    domain_key: str
    """Names the application; processes of one node with one key share a memory domain."""
    model_path: str
    max_model_len: int
    dtype: str
    device: str
    attention: str
    block_size: int
    max_blocks: int
    """Address range of a segment, in blocks."""
    num_work_tokens: int
    """Tokens of the largest step."""
    orphan_timeout_s: float
    private_kv: bool = False
    """The stage's KV is a domain of its own, also on a node that it shares with others."""
    host_cache_bytes: int | None = 0
    """Limit of what the node keeps of the model beside its stages; None: the whole model, 0: nothing."""
    host_cache_key: str = ""
    """Names the application where its pipelines have domains of their own: they share what the node keeps."""
    linear: str = "auto"
    """Kind of linear map; 'auto': the one that is fastest on the stage's machine."""
    cores: tuple[int, ...] = ()
    """CPU cores that the stage's process has to itself; (): it shares the node's."""
    cpu_share: float = 1.0
    """Below 1 a slower device is emulated: the stage rests after each step, and computes this share of the time."""
    keys: CurveKeys | None = None
    """For tcp between nodes."""


@dataclass(frozen=True, kw_only=True)
class Incoming:
    """Layers whose KV another stage copies to this one before the epoch begins."""

    source: str
    endpoint: Endpoint
    """The source's inbox, for acknowledgements."""
    layers: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """A stage's part in the layout of one epoch."""

    epoch: int
    start: int
    stop: int
    is_first: bool
    is_last: bool
    next: Endpoint
    """The next stage's inbox, or the Router's behind the last stage."""
    incoming: tuple[Incoming, ...] = ()
    """Empty where the KV is in the stage's domain already, or there is none."""
    hurry: bool = False
    """Load without rests, though steps run."""

    @property
    def layers(self) -> range:
        """Global indices of the layers."""
        return range(self.start, self.stop)


@dataclass(frozen=True, kw_only=True)
class StageReport:
    """A stage's state, for sizing the KV and for people."""

    name: str
    setup: StageSetup
    pid: int
    node: str
    device: str
    compute: str
    """What computes: stages with the same one take turns, others work at the same time."""
    speed: float
    """Of that, in units of the whole node's cores or of the GPU; an estimate where the stage has cores of its own."""
    domain: str
    """Node and device whose memory it takes."""
    domain_free_bytes: int
    endpoint: Endpoint
    epoch: int
    """Of the newest assignment; 0 before the first."""
    start: int
    stop: int
    weight_sizes: WeightSizes
    overhead_bytes: int
    """Memory of the process beside weights and KV: measured, plus an estimate of a step's work buffers."""
    kv_bytes: int
    num_blocks: int
    num_steps: int
    busy_seconds: float
    copied_bytes: int = 0
    """Snapshots and patches received for the newest epoch."""
    patch_bytes: int = 0
    """Of those, patches."""
    host_cache: HostCacheUse | None = None
    """Of its node; None: there is none."""

    @property
    def weights_bytes(self) -> int:
        """Memory of the weights held."""
        return self.weight_sizes.total


def stage_domain(setup: StageSetup, *, name: str, node: str, device: str) -> str:
    """The domain whose memory stage ``name`` takes: the node's, its device's, or one of its own."""
    if device != "cpu":
        return f"{node}/{device}"
    return f"{node}/{name}" if setup.private_kv else node


def stage_compute(setup: StageSetup, *, node: str, device: str) -> str:
    """What stage ``setup.name`` computes with: its device, cores of its own, or the cores that its node's stages
    share."""
    if device != "cpu":
        return f"{node}/{device}"
    return f"{node}/cores {','.join(map(str, setup.cores))}" if setup.cores else f"{node}/cpu"


def folder_key(domain_key: str, node: str) -> str:
    """Names an application's folder of shared memory on one node: nodes of a Ray cluster may stand on one machine, and
    what is copied from one to the other must not be the same file."""
    return f"{domain_key}/{node}"


class StageHandle(Protocol):
    """The Router's grip on one stage. Futures fail when the stage is lost."""

    name: str

    def report(self) -> Future[StageReport]: ...

    def prepare(self, assignment: Assignment, *, num_blocks: int, fresh: bool) -> Future[StageReport]:
        """Get ready for the steps of ``assignment.epoch``: load the layers that are missing, have KV segments with
        ``num_blocks`` blocks for them, connect the route. Steps of older epochs go on undisturbed meanwhile.

        Args:
            fresh: this is a start and no refactoring: older epochs and all KV are void, and loading need not be gentle.

        Fails with KVMemoryError or UnsupportedModelError; then call ``release``.
        """
        ...

    def resize_kv(self, num_blocks: int, *, fresh: bool = False) -> Future[None]:
        """Have exactly ``num_blocks`` blocks in every segment. Fails with KVMemoryError; then all is as before.

        Args:
            fresh: as for ``prepare``.
        """
        ...

    def wait_copied(self, epoch: int, *, through_step: int, timeout_s: float) -> Future[None]:
        """Ends when the snapshots of all incoming layers of ``epoch`` are applied, and every patch up to
        ``through_step`` of the epoch before (0: the snapshots alone). Fails with CopyError: a patch is missing, the
        epoch was released, or the time is over."""
        ...

    def release(self, epoch: int) -> Future[StageReport]:
        """Forget an epoch: its route, its copies (given and taken), and weights and KV that no other epoch needs."""
        ...

    def watch(self) -> Future[None]:
        """Ends only when the stage does: the failure detector."""
        ...

    def stop(self) -> None:
        """End the stage and everything it holds; waits a moment for an orderly end."""
        ...


class StageHost(Protocol):
    """Where stages run."""

    node: str

    def launch(self, setup: StageSetup, *, node: str | None = None) -> StageHandle:
        """A stage of that name: one that is still alive from an earlier Router, or a new one.

        Args:
            node: where a new one must run; None: wherever the host likes.
        """
        ...

    def topology(self, *, kind: DeviceKind) -> Topology:
        """The nodes there are, and their devices of a kind. Deadlines are Unix time."""
        ...

    def read_drained(self) -> dict[str, float]:
        """What :meth:`write_drained` was told last, also by an earlier Router."""
        ...

    def write_drained(self, deadlines: Mapping[str, float], /) -> None:
        """Keep the nodes that somebody wants empty, with their deadlines, for a later Router."""
        ...
