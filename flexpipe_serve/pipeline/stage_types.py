"""What Router and stages say to each other outside the step stream."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from flexpipe_serve.pipeline.channel import CurveKeys, Endpoint


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
    linear: str = "auto"
    """Kind of linear map; 'auto': the one that is fastest on the stage's machine."""
    keys: CurveKeys | None = None
    """For tcp between nodes."""


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
    domain: str
    """Node and device whose memory it takes."""
    domain_free_bytes: int
    endpoint: Endpoint
    epoch: int
    """Of the newest assignment; 0 before the first."""
    start: int
    stop: int
    weights_bytes: int
    overhead_bytes: int
    """Memory of the process beside weights and KV: measured, plus an estimate of a step's work buffers."""
    kv_bytes: int
    num_blocks: int
    num_steps: int
    busy_seconds: float


class StageHandle(Protocol):
    """The Router's grip on one stage. Futures fail when the stage is lost."""

    name: str

    def report(self) -> Future[StageReport]: ...

    def configure(self, assignment: Assignment) -> Future[StageReport]:
        """Load and drop layers so that exactly the assignment's are held, and take its route."""
        ...

    def commit_kv(self, num_blocks: int) -> Future[None]:
        """Make exactly ``num_blocks`` blocks of every held layer usable."""
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

    def launch(self, setup: StageSetup) -> StageHandle:
        """A stage of that name: one that is still alive from an earlier Router, or a new one."""
        ...
