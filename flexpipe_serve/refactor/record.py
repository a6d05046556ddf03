"""What somebody asks of a refactoring, and the record it leaves (DESIGN: every refactoring leaves one)."""

from __future__ import annotations

import math
from enum import StrEnum
from itertools import pairwise
from typing import Annotated

import msgspec

from flexpipe_serve.errors import InvalidRequestError

MAX_REASON_CHARS = 200
_Int = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]


class Mode(StrEnum):
    """How much of a refactoring happens while steps go on."""

    LIVE = "live"
    """All of it."""
    WEIGHTS_ONLY = "weights_only"
    """The weights; then the pipeline stops for one copy of the KV and the switch."""
    SYNC = "sync"
    """Nothing: stop, load, copy, switch, go on."""
    RESTART = "restart"
    """Nothing: tear the pipeline down, build the new one, replay the sequences from their tokens."""


class Phase(StrEnum):
    """Where a refactoring is; in this order."""

    PLAN = "plan"
    PREPARE = "prepare"
    COPY = "copy"
    MIRROR = "mirror"
    SWITCH = "switch"
    RETIRE = "retire"


class Outcome(StrEnum):
    """How it ended, or that it has not."""

    RUNNING = "running"
    DONE = "done"
    REFUSED = "refused"
    """Nothing was touched."""
    ABORTED = "aborted"
    """Before the switch: the old layout serves on."""
    RECOVERED = "recovered"
    """A stage was lost after the switch: the new layout was rebuilt and sequences replayed."""


class RefactorRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The body of ``POST /flexpipe/refactor``. Exactly one of ``stages`` and ``boundaries``.

    Raises:
        InvalidRequestError: naming the field that is out of range.
    """

    stages: _Int | None = None
    """Number of stages, with layers split as the server likes."""
    boundaries: tuple[_Int, ...] | None = None
    """First layer of each later stage; () is a single stage."""
    pipeline: Annotated[int, msgspec.Meta(ge=0, le=2**31)] = 0
    """Number of the pipeline, where there are several."""
    nodes: tuple[str, ...] | None = None
    """Where each stage shall stand, in pipeline order: a node's id as ``GET /flexpipe/status`` shows it, the beginning
    of that, or its address where no other node has the same. By default stages stay where they are, and new ones join
    them."""
    avoid: tuple[str, ...] = ()
    """Nodes whose layers go elsewhere."""
    mode: Mode = Mode.LIVE
    hurry: bool = False
    """Load weights without the rests that spare those who wait for tokens: for a node that is about to go, or where
    requests wait for what the new layout brings."""
    dry_run: bool = False
    """Only plan: say what would be done and whether it fits."""
    resize_kv: bool = True
    """Let KV capacity grow after the switch to what the new layout allows (it always shrinks where it must)."""
    max_bytes_per_s: float | None = None
    """Limit of copying KV; the configuration's by default."""
    timeout_s: float = 300.0
    """Time from the start to the switch; then it is aborted."""
    reason: str = "requested"
    """Stands in the record."""

    def __post_init__(self) -> None:
        if (self.stages is None) == (self.boundaries is None):
            seen = "neither" if self.stages is None else "both"
            raise InvalidRequestError(f"Give either stages or boundaries; there are {seen}.", param="stages")
        if self.stages is not None and self.stages < 1:
            raise InvalidRequestError(f"stages is {self.stages}; it must be at least 1.", param="stages")
        if self.boundaries is not None:
            self._check_boundaries(self.boundaries)
        num_stages = self.stages if self.boundaries is None else len(self.boundaries) + 1
        if self.nodes is not None and len(self.nodes) != num_stages:
            raise InvalidRequestError(
                f"nodes names {len(self.nodes)} for {num_stages} stages; name one node for each stage.", param="nodes"
            )
        for name in ("max_bytes_per_s", "timeout_s"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise InvalidRequestError(f"{name} is {value:g}; it must be above 0.", param=name)
        if len(self.reason) > MAX_REASON_CHARS:
            raise InvalidRequestError(
                f"reason has {len(self.reason)} characters; at most {MAX_REASON_CHARS} are kept.", param="reason"
            )

    @staticmethod
    def _check_boundaries(boundaries: tuple[int, ...]) -> None:
        for former, latter in pairwise((0, *boundaries)):
            if latter <= former:
                what = "at least 1" if former == 0 else f"above the one before it, {former}"
                raise InvalidRequestError(
                    f"boundaries has {latter}; the first layer of each later stage must be {what}.", param="boundaries"
                )


class StagePlan(msgspec.Struct, frozen=True, kw_only=True):
    """One stage of a layout."""

    stage: str
    start: int
    """First layer."""
    stop: int
    """First layer behind."""
    node: str | None = None
    """Where it stands."""


class MovePlan(msgspec.Struct, frozen=True, kw_only=True):
    """Layers that go from one stage to another."""

    source: str
    target: str
    layers: tuple[int, ...]
    shared: bool
    """Both are in one domain: the target maps the KV, nothing is copied."""


class DomainPlan(msgspec.Struct, frozen=True, kw_only=True):
    """Memory of one domain while the refactoring runs, in bytes."""

    domain: str
    budget_bytes: int
    weights_bytes: int
    """Of the old and the new layers together."""
    overhead_bytes: int
    kv_bytes: int
    """With ``RefactorPlan.num_blocks_during``."""


class RefactorPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What PLAN found."""

    verdict: str
    """'fits', 'fits after shrinking' or 'refused'."""
    reason: str
    """In one sentence, with the numbers that decided."""
    old: tuple[StagePlan, ...]
    new: tuple[StagePlan, ...]
    moves: tuple[MovePlan, ...]
    launched: tuple[str, ...]
    """Stages to be started or taken from the pool."""
    retired: tuple[str, ...]
    """Stages that hold no layer afterwards."""
    domains: tuple[DomainPlan, ...]
    num_blocks_before: int
    num_blocks_during: int
    num_blocks_after: int
    """Predicted; the record has what was reached."""
    weights_bytes: int
    """To be loaded."""
    kv_bytes: int
    """To be copied, as of now; 0 inside a domain."""


class PhaseTime(msgspec.Struct, frozen=True, kw_only=True):
    """One phase of a refactoring."""

    phase: Phase
    start_s: float
    """Since the request."""
    seconds: float


class RefactorRecord(msgspec.Struct, kw_only=True):
    """All that is known of one refactoring; the body of ``GET /flexpipe/refactor/{id}``."""

    id: str
    mode: Mode
    reason: str
    hurry: bool = False
    outcome: Outcome
    phase: Phase
    """The present or the last one."""
    plan: RefactorPlan
    epoch: int
    """The new layout's."""
    requested_at: float
    """Unix time."""
    seconds: float = 0.0
    """Since the request, or in total."""
    phases: list[PhaseTime] = msgspec.field(default_factory=list)
    error: str | None = None
    """Why it was refused or aborted."""
    snapshot_bytes: int = 0
    patch_bytes: int = 0
    num_rounds: int = 0
    """Snapshots taken of each moving layer: 1 where KV was copied, else 0."""
    progress: float = 0.0
    """0 to 1, of the present phase."""
    switch_step: int | None = None
    switched_at: float | None = None
    """Unix time."""
    stop_seconds: float = 0.0
    """Time in which steps that could have run were held back because of it, in Router and stages."""
    longest_hold_seconds: float = 0.0
    """The longest that one step was held back."""
    num_tokens_meanwhile: int = 0
    """Sampled between request and end."""
    num_blocks: int = 0
    """KV capacity now, or in the end."""
    num_replayed: int = 0
    """Sequences whose KV was lost and computed again."""

    @property
    def is_over(self) -> bool:
        """Whether it has ended."""
        return self.outcome is not Outcome.RUNNING
