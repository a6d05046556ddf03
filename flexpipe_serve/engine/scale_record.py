"""What somebody asks when pipelines shall come or go, and what came of it."""

from __future__ import annotations

from typing import Annotated

import msgspec

from flexpipe_serve.errors import InvalidRequestError
from flexpipe_serve.refactor.record import MAX_REASON_CHARS

MAX_PIPELINES = 64
_Int = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]


class PipelineLayout(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The split of one pipeline. Exactly one of the two.

    Raises:
        InvalidRequestError: naming the field that is wrong.
    """

    stages: _Int | None = None
    """Number of stages, with layers split evenly."""
    boundaries: tuple[_Int, ...] | None = None
    """First layer of each later stage; () is a single stage."""

    def __post_init__(self) -> None:
        if (self.stages is None) == (self.boundaries is None):
            seen = "neither" if self.stages is None else "both"
            raise InvalidRequestError(f"Give either stages or boundaries; there are {seen}.", param="layouts")


class ScaleRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The body of ``POST /flexpipe/scale``. Exactly one of ``pipelines`` and ``layouts``.

    Raises:
        InvalidRequestError: naming the field that is out of range.
    """

    pipelines: _Int | None = None
    """How many there shall be: further ones are split like the first, and of too many the last ones go."""
    layouts: tuple[PipelineLayout, ...] | None = None
    """The split of each, in order; one that serves with another split is refactored."""
    reason: str = "requested"
    """Stands in the events."""

    def __post_init__(self) -> None:
        if (self.pipelines is None) == (self.layouts is None):
            seen = "neither" if self.pipelines is None else "both"
            raise InvalidRequestError(f"Give either pipelines or layouts; there are {seen}.", param="pipelines")
        param = "pipelines" if self.layouts is None else "layouts"
        if not 1 <= self.num_pipelines <= MAX_PIPELINES:
            raise InvalidRequestError(
                f"{param} asks for {self.num_pipelines} pipelines; there can be 1 to {MAX_PIPELINES}.", param=param
            )
        if len(self.reason) > MAX_REASON_CHARS:
            raise InvalidRequestError(
                f"reason has {len(self.reason)} characters; at most {MAX_REASON_CHARS} are kept.", param="reason"
            )

    @property
    def num_pipelines(self) -> int:
        """How many there shall be."""
        if self.layouts is not None:
            return len(self.layouts)
        assert self.pipelines is not None
        return self.pipelines


class PipelineState(msgspec.Struct, frozen=True, kw_only=True):
    """One pipeline afterwards."""

    pipeline: int
    """Its number."""
    boundaries: tuple[int, ...]
    num_blocks: int
    """KV capacity."""


class ScaleRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What was done; the answer of ``POST /flexpipe/scale``."""

    reason: str
    num_before: int
    pipelines: tuple[PipelineState, ...]
    """All that serve now."""
    num_handed_over: int
    """Sequences that go on in another pipeline than before."""
    seconds: float
