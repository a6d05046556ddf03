"""Which stage takes which slice, and where it stands: pure code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flexpipe_serve.pipeline.layout import Layout, StageSlice
from flexpipe_serve.placement.matching import match_stages
from flexpipe_serve.refactor.moves import name_stages


@dataclass(frozen=True)
class Placed:
    """A layout, and the node of each of its stages."""

    layout: Layout
    node_of: dict[str, str]


def place_stages(
    old: Layout,
    boundaries: Sequence[int],
    *,
    nodes: Sequence[str] | None,
    node_of: Mapping[str, str],
    spare: Sequence[str],
    usable: Sequence[str],
) -> Placed:
    """The layout with these boundaries that moves the fewest layers.

    Args:
        boundaries: first layer of each later stage.
        nodes: where each stage shall stand. None: stages stay where they are, if they may; new ones join the first
            that may, and those that have to go are spread, fewest layers first.
        node_of: of every stage that runs.
        spare: stages that run and hold nothing.
        usable: nodes where stages may stand; not empty, and holds all of ``nodes``.

    Raises:
        ConfigError: the model cannot be cut like that, or there is not one node for each stage.
    """
    if nodes is None:
        home = next((node_of[name] for name in old.stages if node_of[name] in usable), usable[0])
        running = (*old.stages, *spare)
        if all(node_of.get(name, home) in usable for name in running):
            layout = name_stages(old, boundaries, num_layers=old.num_layers, spare=spare)
            return Placed(layout, {name: node_of.get(name, home) for name in layout.stages})
        nodes = _spread(old, boundaries, node_of=node_of, usable=usable)
    staying = [name for name in spare if node_of.get(name) in usable]
    layout = match_stages(old, boundaries, num_layers=old.num_layers, nodes=nodes, node_of=node_of, spare=staying)
    return Placed(layout, dict(zip(layout.stages, nodes, strict=True)))


def _spread(
    old: Layout, boundaries: Sequence[int], *, node_of: Mapping[str, str], usable: Sequence[str]
) -> tuple[str, ...]:
    """A node for each slice: that of the stage that would keep most of it, where this may stay."""
    layout = name_stages(old, boundaries, num_layers=old.num_layers)
    nodes = [node_of.get(part.stage) for part in layout.slices]
    load = dict.fromkeys(usable, 0)
    homeless: list[tuple[int, StageSlice]] = []
    for i, part in enumerate(layout.slices):
        node = nodes[i]
        if node in load:
            load[node] += len(part.layers)
        else:
            homeless.append((i, part))
    for i, part in homeless:
        taker = min(usable, key=lambda node: load[node])
        nodes[i] = taker
        load[taker] += len(part.layers)
    return tuple(node for node in nodes if node is not None)
