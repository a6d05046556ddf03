"""Which layouts a refactoring benchmark goes through: pure, seeded."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from flexpipe_serve.errors import ConfigError

Boundaries = tuple[int, ...]
"""First layer of each later stage; () is a single stage."""

KINDS = ("shift", "split", "both-ways", "merge", "scale-in", "scale-out")
_MIN_LAYERS = 6


@dataclass(frozen=True, slots=True)
class Step:
    """One refactoring to be measured.

    Args:
        kind: one of KINDS, or ``random``.
        old: the layout before.
        new: the layout after.
    """

    kind: str
    old: Boundaries
    new: Boundaries


def tour(num_layers: int, *, kinds: Sequence[str] = KINDS) -> list[Step]:
    """One refactoring of each kind. With all kinds each starts where the one before ended, and the last ends where the
    first started: two stages cut in the middle.

    * shift: the boundary between two stages moves;
    * split: 2 stages become 3;
    * both-ways: of 3 stages the middle one takes layers from both neighbours at once;
    * merge: 3 stages become 2;
    * scale-in: 2 stages become 1;
    * scale-out: 1 stage becomes 2.

    Raises:
        ConfigError: an unknown kind, or a model with too few layers for all of this.
    """
    for kind in kinds:
        if kind not in KINDS:
            raise ConfigError(f"there is no kind {kind!r} of refactoring; known are {', '.join(KINDS)}")
    if num_layers < _MIN_LAYERS:
        raise ConfigError(f"the model has {num_layers} layers; at least {_MIN_LAYERS} are needed")
    half, third, sixth = num_layers // 2, num_layers // 3, num_layers // 6
    two, shifted = (half,), (half + max(1, round(num_layers * 2 / 15)),)
    three, wide = (third, num_layers - third), (sixth, num_layers - sixth)
    steps = [
        Step("shift", two, shifted),
        Step("split", shifted, three),
        Step("both-ways", three, wide),
        Step("merge", wide, two),
        Step("scale-in", two, ()),
        Step("scale-out", (), two),
    ]
    return [step for step in steps if step.kind in kinds]


def random_steps(
    num_steps: int, *, start: Boundaries, num_layers: int, max_stages: int, rng: np.random.Generator
) -> Iterator[Step]:
    """Back-to-back refactorings between random layouts of 1 to ``max_stages`` stages.

    The last of several ends at ``start``. Each number of stages is as likely as any other, and within it each set of
    boundaries; no step keeps its layout.

    Raises:
        ConfigError: there is only one layout to choose from.
    """
    if min(max_stages, num_layers) < 2:
        raise ConfigError(f"max stages is {max_stages}, of {num_layers} layers; nothing can change below 2")
    old = start
    for index in range(num_steps):
        new = start if index == num_steps - 1 else old
        # The step before the last must leave the start, else the last would change nothing.
        while new == old or (index == num_steps - 2 and new == start):
            num_stages = int(rng.integers(1, min(max_stages, num_layers) + 1))
            cuts = rng.choice(np.arange(1, num_layers), num_stages - 1, replace=False)
            new = tuple(sorted(int(cut) for cut in cuts))
        yield Step("random", old, new)
        old = new
