"""What somebody asks when a node is to be emptied, and the record of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import StrEnum

import msgspec

from flexpipe_serve.errors import InvalidRequestError

MAX_REASON_CHARS = 200


class DrainState(StrEnum):
    """How far a node is with being emptied."""

    DRAINING = "draining"
    """Stages stand on it, and are being moved away."""
    EMPTY = "empty"
    """No stage stands on it, and none is launched there any more."""
    LOST = "lost"
    """It was gone before it was empty: what it held is brought up elsewhere, and sequences are replayed."""


class DrainRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The body of ``POST /flexpipe/drain``.

    Raises:
        InvalidRequestError: naming the field that is out of range.
    """

    node: str
    """Its id as ``GET /flexpipe/status`` shows it, the beginning of that, or its address where no other node has
    the same."""
    deadline_s: float = 60.0
    """Seconds until it may be gone: it is emptied before."""
    reason: str = "requested"
    """Stands in the record."""

    def __post_init__(self) -> None:
        if not 0 < self.deadline_s < math.inf:
            raise InvalidRequestError(f"deadline_s is {self.deadline_s:g}; it must be above 0.", param="deadline_s")
        if len(self.reason) > MAX_REASON_CHARS:
            raise InvalidRequestError(
                f"reason has {len(self.reason)} characters; at most {MAX_REASON_CHARS} are kept.", param="reason"
            )


class DrainRecord(msgspec.Struct, kw_only=True):
    """All that is known of a node's emptying; the body of ``GET /flexpipe/drain/{node}``."""

    node: str
    """Its id."""
    state: DrainState
    reason: str
    message: str
    """How things stand, in one sentence."""
    requested_at: float
    """Unix time."""
    deadline_at: float | None
    """Unix time; None: there is none."""
    holds_router: bool
    """The Router itself runs there: it stays, and ends with the node."""
    seconds: float = 0.0
    """Since the request; once the node is empty, what that took."""
    stages: tuple[str, ...] = ()
    """Still there."""
    refactorings: tuple[str, ...] = ()
    """Made for it, by id, the latest last."""
    predicted_s: float | None = None
    """What the latest of them was predicted to take."""
    error: str | None = None
    """Why it does not get on; it is tried again."""

    @property
    def is_over(self) -> bool:
        """Whether nothing more is to be done: it is empty, or gone."""
        return self.state is not DrainState.DRAINING


def merge_drains(records: Sequence[DrainRecord]) -> DrainRecord:
    """One record of the same node's emptying by several pipelines: it is empty when all have left it."""
    first = records[0]
    assert all(record.node == first.node for record in records)
    order = (DrainState.DRAINING, DrainState.LOST, DrainState.EMPTY)
    state = min((record.state for record in records), key=order.index)
    telling = [record for record in records if record.state is state]
    predicted = [record.predicted_s for record in records if record.predicted_s is not None]
    return msgspec.structs.replace(
        first,
        state=state,
        message=" ".join(dict.fromkeys(record.message for record in telling)),
        seconds=max(record.seconds for record in records),
        stages=tuple(stage for record in records for stage in record.stages),
        refactorings=tuple(name for record in records for name in record.refactorings),
        predicted_s=max(predicted, default=None),
        error="; ".join(record.error for record in records if record.error is not None) or None,
    )
