"""Which layouts do without the nodes that are to be emptied: pure code."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from flexpipe_serve.pipeline.layout import Layout, even_boundaries

_MAX_TAKERS = 4
"""Nodes that are offered to take all that has to go."""


@dataclass(frozen=True)
class DrainOption:
    """A split, and the node of each stage."""

    boundaries: tuple[int, ...]
    nodes: tuple[str, ...]


def drain_options(layout: Layout, *, node_of: Mapping[str, str], usable: Sequence[str]) -> tuple[DrainOption, ...]:
    """Layouts that stand on ``usable`` nodes only, those that change least first.

    First the same split with its homeless stages spread over the usable nodes, fewest layers first; then with all of
    them on one node, for some; then their layers given to the neighbours that stay, and to all that stay evenly; last
    everything on one node. Memory is not looked at: ask for a plan of each.

    Args:
        node_of: of every stage in ``layout``.
        usable: where stages may stand; those elsewhere have to go. Earlier ones are preferred.
    """
    return tuple(dict.fromkeys(_options(layout, node_of, usable))) if usable else ()


def _options(layout: Layout, node_of: Mapping[str, str], usable: Sequence[str]) -> Iterator[DrainOption]:
    parts = layout.slices
    present = [node_of[part.stage] if node_of[part.stage] in usable else None for part in parts]
    load = dict.fromkeys(usable, 0)
    for part, node in zip(parts, present, strict=True):
        if node is not None:
            load[node] += len(part.layers)
    takers = sorted(usable, key=lambda node: load[node])[:_MAX_TAKERS]
    spread = list(present)
    for i, part in enumerate(parts):
        if present[i] is None:
            taker = min(usable, key=lambda node: load[node])
            spread[i] = taker
            load[taker] += len(part.layers)
    yield DrainOption(layout.boundaries, tuple(node for node in spread if node is not None))
    for taker in takers:
        yield DrainOption(layout.boundaries, tuple(node or taker for node in present))
    staying = [node for node in present if node is not None]
    if staying:
        yield DrainOption(_absorbed(layout, [node is not None for node in present]), tuple(staying))
        even = even_boundaries(num_layers=layout.num_layers, num_stages=len(staying))
        yield DrainOption(even, tuple(staying))
    for taker in takers:
        yield DrainOption((), (taker,))


def _absorbed(layout: Layout, stays: Sequence[bool]) -> tuple[int, ...]:
    """Boundaries of the stages that stay when each takes what the others leave beside it, half of what lies between
    two."""
    boundaries = []
    stop: int | None = None
    for part, is_there in zip(layout.slices, stays, strict=True):
        if is_there:
            if stop is not None:
                boundaries.append((stop + part.start) // 2)
            stop = part.stop
    return tuple(boundaries)
