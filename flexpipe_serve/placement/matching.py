"""Which stage takes which slice of a new split when slices have nodes to stand on: pure code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from flexpipe_serve.errors import ConfigError
from flexpipe_serve.pipeline.layout import Layout, StageSlice, make_layout, stage_name
from flexpipe_serve.placement.assignment import assign


class _Worth(NamedTuple):
    """Why a stage should take a slice, the weightiest reason first."""

    num_kept: int
    """Layers it holds already: nothing of them is loaded or copied."""
    is_running: int
    """No process has to start."""
    num_near: int
    """Layers that a stage of its node holds: their KV can be shared there."""
    is_old: int
    """It would be ended otherwise; a spare one stays ready."""
    precedence: int
    """Earlier in the list; makes the choice the same every time."""


def match_stages(
    old: Layout,
    new_boundaries: Sequence[int],
    *,
    num_layers: int,
    nodes: Sequence[str | None],
    node_of: Mapping[str, str],
    spare: Sequence[str] = (),
) -> Layout:
    """The layout with these boundaries whose stages are chosen so that the fewest layers move.

    A slice is taken by a stage that stands on its node, or by one that does not exist yet; those are named by the
    lowest free ``stage-N`` and are to be launched on ``nodes[i]``. Exact: an assignment problem. Among choices that
    move equally many layers it takes the one that launches the fewest stages, then the one whose moved layers stay
    most on their node (KV is shared there), then stages of ``old`` before ``spare`` ones. Stages need not keep their
    order.

    Args:
        new_boundaries: first layer of each later stage.
        nodes: for each new slice the node it shall stand on; None: any.
        node_of: node of each running stage; one that is missing takes only slices without a node.
        spare: stages that run and hold nothing (the warm pool).

    Raises:
        ConfigError: the model cannot be cut like that, or there is not one node for each slice.
    """
    cut = make_layout(num_layers=num_layers, boundaries=new_boundaries).slices
    if len(nodes) != len(cut):
        raise ConfigError(f"{len(nodes)} nodes for {len(cut)} stages; name one node for each stage.")
    running = [*old.stages, *spare]
    near = _layers_by_node(old, node_of)
    held = {part.stage: part for part in old.slices}
    base = 1 + num_layers + len(cut) * len(running)
    # One column for each stage that runs and one for each that may have to be launched.
    forbidden = base ** (len(_Worth._fields) + 1)
    costs = []
    for part, node in zip(cut, nodes, strict=True):
        line = []
        for rank, name in enumerate(running):
            its_node = node_of.get(name)
            if node is not None and its_node != node:
                line.append(forbidden)
                continue
            worth = _Worth(
                num_kept=_num_common(held[name], part) if name in held else 0,
                is_running=1,
                num_near=_num_near(its_node, part, near),
                is_old=int(name in held),
                precedence=len(running) - rank,
            )
            line.append(-_as_number(worth, base))
        launched = _Worth(num_kept=0, is_running=0, num_near=_num_near(node, part, near), is_old=0, precedence=0)
        costs.append([*line, *([-_as_number(launched, base)] * len(cut))])
    taken = [running[column] if column < len(running) else None for column in assign(costs)]
    names = _name_launched(taken, known={*running, *node_of}, prefix=old.prefix)
    return make_layout(num_layers=num_layers, boundaries=new_boundaries, stages=names)


def _as_number(worth: _Worth, base: int) -> int:
    """One number that orders sums of worths as their fields do; ``base`` is above the sum of any field."""
    number = 0
    for digit in worth:
        number = number * base + digit
    return number


def _num_common(a: StageSlice, b: StageSlice) -> int:
    return max(0, min(a.stop, b.stop) - max(a.start, b.start))


def _num_near(node: str | None, part: StageSlice, near: Mapping[str, frozenset[int]]) -> int:
    return len(near[node].intersection(part.layers)) if node is not None and node in near else 0


def _layers_by_node(layout: Layout, node_of: Mapping[str, str]) -> dict[str, frozenset[int]]:
    layers: dict[str, frozenset[int]] = {}
    for part in layout.slices:
        node = node_of.get(part.stage)
        if node is not None:
            layers[node] = layers.get(node, frozenset()) | frozenset(part.layers)
    return layers


def _name_launched(taken: Sequence[str | None], *, known: set[str], prefix: str) -> list[str]:
    """Names for all, with the lowest free number where there is none yet."""
    names = (stage_name(i, prefix) for i in range(len(known) + len(taken)))
    free = (name for name in names if name not in known)
    return [name if name is not None else next(free) for name in taken]
