"""Which stage holds which layers: an immutable value, pure code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flexpipe_serve.errors import ConfigError

_STAGE = "stage"


@dataclass(frozen=True)
class StageSlice:
    """A stage and its contiguous layers ``start <= i < stop``."""

    stage: str
    start: int
    stop: int

    @property
    def layers(self) -> range:
        """Global indices of the stage's layers."""
        return range(self.start, self.stop)


@dataclass(frozen=True)
class Layout:
    """The assignment of all layers to an ordered list of stages.

    Raises:
        ConfigError: the slices are not contiguous from layer 0, one is empty, or a stage occurs twice.
    """

    slices: tuple[StageSlice, ...]

    def __post_init__(self) -> None:
        if not self.slices:
            raise ConfigError("a layout needs at least one stage; 0 were given.")
        expected = 0
        for part in self.slices:
            if part.start != expected or part.stop <= part.start:
                raise ConfigError(
                    f"stage {part.stage!r} holds layers {part.start}..{part.stop - 1}; its slice must start at layer"
                    f" {expected} and hold at least one layer. Boundaries must rise strictly."
                )
            expected = part.stop
        names = [part.stage for part in self.slices]
        if len(set(names)) != len(names):
            raise ConfigError(f"stages {names} name one stage twice; each stage has one slice.")

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        return self.slices[-1].stop

    @property
    def num_stages(self) -> int:
        """The granularity."""
        return len(self.slices)

    @property
    def boundaries(self) -> tuple[int, ...]:
        """First layer of each stage but the first."""
        return tuple(part.start for part in self.slices[1:])

    @property
    def prefix(self) -> str:
        """What its stages' names begin with, and those that join them."""
        return self.slices[0].stage.rpartition(f"{_STAGE}-")[0]

    @property
    def stages(self) -> tuple[str, ...]:
        """Stage names in pipeline order."""
        return tuple(part.stage for part in self.slices)


def stage_name(index: int, prefix: str = "") -> str:
    """Name of the ``index``-th stage that a pipeline creates.

    Args:
        prefix: of all its stages' names, see ``stage_prefix``.
    """
    return f"{prefix}{_STAGE}-{index}"


def stage_prefix(pipeline: int) -> str:
    """What the names of a pipeline's stages begin with: nothing for the first one, number 0, then 'p1-', ..."""
    return f"p{pipeline}-" if pipeline else ""


def even_boundaries(*, num_layers: int, num_stages: int) -> tuple[int, ...]:
    """First layers of the later stages when layers are split evenly.

    The stages that get one layer more stand in the middle: the ends also hold embedding and LM head.

    Raises:
        ConfigError: more stages than layers.
    """
    if num_stages > num_layers:
        raise ConfigError(f"{num_stages} stages for {num_layers} layers; each stage needs at least one layer.")
    base, extra = divmod(num_layers, num_stages)
    first_larger = (num_stages - extra + 1) // 2
    sizes = [base + (first_larger <= i < first_larger + extra) for i in range(num_stages)]
    return tuple(sum(sizes[:i]) for i in range(1, num_stages))


def make_layout(
    *, num_layers: int, boundaries: Sequence[int], stages: Sequence[str] | None = None, prefix: str = ""
) -> Layout:
    """The layout with these boundaries; stages are named in order by default.

    Args:
        prefix: of names made here.

    Raises:
        ConfigError: a boundary outside 1..num_layers-1, or not rising.
    """
    edges = [0, *boundaries, num_layers]
    for boundary in boundaries:
        if not 0 < boundary < num_layers:
            raise ConfigError(
                f"boundary {boundary} must lie between 1 and {num_layers - 1} (the model has {num_layers} layers)."
            )
    names = stages if stages is not None else [stage_name(i, prefix) for i in range(len(edges) - 1)]
    return Layout(tuple(StageSlice(n, a, b) for n, a, b in zip(names, edges[:-1], edges[1:], strict=True)))
