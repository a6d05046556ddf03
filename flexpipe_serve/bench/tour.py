"""Which layouts a refactoring benchmark goes through: pure, seeded."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from flexpipe_serve.errors import ConfigError

Boundaries = tuple[int, ...]
"""First layer of each later stage; () is a single stage."""

KINDS = ("shift", "split", "both-ways", "merge", "scale-in", "scale-out")
_MIN_LAYERS = 6
_CHURN_SHARES = {"shift": 0.6, "both-ways": 0.16, "split": 0.12, "merge": 0.12}
"""How often each kind; few splits, for each may start a process, which takes longer than all the rest."""
_MAX_MOVED = 3
"""Layers that a boundary moves by, or that a stage begins with."""


@dataclass(frozen=True, slots=True)
class Step:
    """One refactoring to be measured.

    Args:
        kind: one of KINDS.
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
    """Back-to-back refactorings between layouts of 1 to ``max_stages`` stages, each of a random kind and but a few
    layers away from the one before. The last of several ends at ``start``, from wherever that is; no step keeps its
    layout.

    Raises:
        ConfigError: there are too few layouts to choose from.
    """
    if max_stages < 2 or num_layers < 3:
        raise ConfigError(
            f"max stages is {max_stages}, of {num_layers} layers; there is a choice from 2 stages of 3 layers on"
        )
    old = start
    for index in range(num_steps):
        kind, new = "shift", start if index == num_steps - 1 else old
        # The step before the last must leave the start, else the last would change nothing.
        while new == old or (index == num_steps - 2 and new == start):
            kind = str(rng.choice(list(_CHURN_SHARES), p=list(_CHURN_SHARES.values())))
            new = _neighbour(old, kind, num_layers=num_layers, max_stages=max_stages, rng=rng)
        yield Step(kind, old, new)
        old = new


def _neighbour(old: Boundaries, kind: str, *, num_layers: int, max_stages: int, rng: np.random.Generator) -> Boundaries:
    """A layout that a step of that kind leads to; ``old`` where there is none."""
    ends = [0, *old, num_layers]
    moved = int(rng.integers(1, _MAX_MOVED + 1))
    if len(old) >= max_stages:  # only where it starts with more than it may have
        return old[: max_stages - 1]
    new = list(old)
    if kind == "split" and len(old) + 1 < max_stages:
        stage = int(rng.integers(len(old) + 1))
        new.append(ends[stage] + moved if rng.random() < 0.5 else ends[stage + 1] - moved)
    elif kind == "merge" and old:
        del new[int(rng.integers(len(old)))]
    elif kind == "shift" and old:
        new[int(rng.integers(len(old)))] += int(rng.choice((-moved, moved)))
    elif kind == "both-ways" and len(old) > 1:
        first, by = int(rng.integers(len(old) - 1)), int(rng.choice((-moved, moved)))
        new[first] -= by
        new[first + 1] += by
    wanted = tuple(sorted(new))
    is_valid = all(former < latter for former, latter in pairwise((0, *wanted, num_layers)))
    return wanted if is_valid else old
