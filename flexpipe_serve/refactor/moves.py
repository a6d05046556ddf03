"""Which layers change their stage between two layouts, and which stage should take which slice: pure code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flexpipe_serve.pipeline.layout import Layout, StageSlice, make_layout, stage_name


@dataclass(frozen=True)
class Move:
    """Layers that go from one stage to another; not empty, rising, contiguous."""

    source: str
    target: str
    layers: tuple[int, ...]


def moves_between(old: Layout, new: Layout) -> tuple[Move, ...]:
    """The layers whose stage differs, one move for each pair of stages, in the order of the layers."""
    assert old.num_layers == new.num_layers
    moves = []
    for giver in old.slices:
        for taker in new.slices:
            layers = _overlap(giver, taker)
            if layers and giver.stage != taker.stage:
                moves.append(Move(giver.stage, taker.stage, tuple(layers)))
    return tuple(moves)


def held_layers(*layouts: Layout) -> dict[str, frozenset[int]]:
    """The layers that each stage holds while all these layouts are served (the union)."""
    held: dict[str, frozenset[int]] = {}
    for layout in layouts:
        for part in layout.slices:
            held[part.stage] = held.get(part.stage, frozenset()) | frozenset(part.layers)
    return held


def name_stages(old: Layout, boundaries: Sequence[int], *, num_layers: int, spare: Sequence[str] = ()) -> Layout:
    """The layout with these boundaries whose stages are named so that the fewest layers move.

    Stages of ``old`` that keep nothing take a slice before ``spare`` ones do (they run already and would be ended
    otherwise), those before stages that do not exist yet; these get the lowest free number of the pipeline's names.

    Args:
        boundaries: first layer of each later stage.
        spare: stages that run and hold nothing (the warm pool).

    Raises:
        ConfigError: the model cannot be cut like that.
    """
    cut = make_layout(num_layers=num_layers, boundaries=boundaries).slices
    kept = _best_matching(old.slices, cut)
    used = set(kept.values())
    free = [name for name in (*old.stages, *spare) if name not in used]
    index = 0
    names = []
    for i in range(len(cut)):
        if i in kept:
            names.append(kept[i])
            continue
        if free:
            names.append(free.pop(0))
            continue
        while (name := stage_name(index, old.prefix)) in used or name in names or name in spare:
            index += 1
        names.append(name)
        index += 1
    return make_layout(num_layers=num_layers, boundaries=boundaries, stages=names)


def _overlap(a: StageSlice, b: StageSlice) -> range:
    return range(max(a.start, b.start), min(a.stop, b.stop))


def _best_matching(old: Sequence[StageSlice], new: Sequence[StageSlice]) -> dict[int, str]:
    """For new slices by index the old stage that keeps most by taking it; slices that nobody keeps a layer of are left
    out. Slices that overlap never cross (both lists are ordered), so the best sequence alignment is the best matching.
    """
    # best[i][j]: layers kept by the first i old and the first j new slices.
    best = [[0] * (len(new) + 1) for _ in range(len(old) + 1)]
    for i, giver in enumerate(old, 1):
        for j, taker in enumerate(new, 1):
            both = best[i - 1][j - 1] + len(_overlap(giver, taker))
            best[i][j] = max(both, best[i - 1][j], best[i][j - 1])
    kept: dict[int, str] = {}
    i, j = len(old), len(new)
    while i and j:
        if best[i][j] == best[i - 1][j]:
            i -= 1
        elif best[i][j] == best[i][j - 1]:
            j -= 1
        else:
            i, j = i - 1, j - 1
            kept[j] = old[i].stage
    return kept
