"""On which nodes the stages of one pipeline stand when nobody names them: the allocator's answer, with what a pipeline
wants of its nodes; pure code."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import product

import msgspec

from flexpipe_serve.placement.affinity import Hosting
from flexpipe_serve.placement.allocation import Allocation, AllocationWeights, Refusal, StageDemand
from flexpipe_serve.placement.allocator import allocate
from flexpipe_serve.placement.nodes import mark_draining, usable_nodes
from flexpipe_serve.placement.resource_graph import ResourceGraph
from flexpipe_serve.placement.topology import Device, Topology

_GIB = 2**30
_WEIGHTS = AllocationWeights(
    stay=100.0,  # stages that run are moved by drains and plans, not because another one starts
    hop=1.0,  # stages of one node share their KV; of one rack, they are quick to reach
    fit=0.0,  # a pipeline makes KV of all the memory that it finds: no hole is left behind
)


def choose_nodes(
    demands: Sequence[StageDemand],
    topology: Topology,
    *,
    at: float,
    current: Mapping[str, str],
    num_others: Mapping[str, int],
    hostings: Collection[Hosting],
    graph: ResourceGraph,
    home: str,
) -> tuple[str, ...] | Refusal:
    """The node of each stage of a pipeline, in their order.

    A further pipeline gets nodes of its own, if there are any with room. Its stages get devices of their own (F14)
    where there are enough of them and those that run keep to that too; else they share as few nodes as they fit on.
    Between equals count, in this order: starts of late (F27) and Eq 13's affinity, few stages of other pipelines,
    memory, and the Router's node.

    Args:
        topology: a device's free memory is what this pipeline may take there.
        at: now, on the clock of ``graph`` and ``hostings``.
        current: node by demand of those that run; they stay unless their new memory does not fit there.
        num_others: stages of the application's other pipelines, by node.
        hostings: nodes that served the model lately.
        home: the Router's node.

    Returns:
        The nodes, or the allocator's refusal where there is no room however devices are shared.
    """
    ordered = _preferred_first(topology, num_others=num_others, home=home)
    places = _places(ordered, current)
    attempts = [ordered]
    alone = mark_draining(ordered, [node for node, num in num_others.items() if num])
    if any(num_others.values()) and usable_nodes(alone):
        attempts.insert(0, alone)
    refusal: Refusal | None = None
    keeps_apart = len(set(places.values())) == len(places)
    for nodes, is_apart in product(attempts, (True, False)):
        if is_apart and not (keeps_apart and len(nodes.usable_devices) >= len(demands)):
            continue
        answer = allocate(
            nodes,
            demands,
            at=at,
            current=places,
            hostings={demand.model: hostings for demand in demands},
            graph=graph,
            anti_affinity=is_apart,
            weights=_WEIGHTS,
        )
        if isinstance(answer, Allocation):
            return tuple(topology.device(name).node for name in answer.devices)
        refusal = answer
    assert refusal is not None
    return refusal


def _preferred_first(topology: Topology, *, num_others: Mapping[str, int], home: str) -> Topology:
    """The allocator takes the first of devices that score the same."""

    def rank(device: Device) -> tuple[int, int, bool]:
        return num_others.get(device.node, 0), -round(device.free_bytes / _GIB), device.node != home

    return msgspec.structs.replace(topology, devices=tuple(sorted(topology.devices, key=rank)))


def _places(topology: Topology, current: Mapping[str, str]) -> dict[str, str]:
    """A device for each stage that runs. Which of a node's devices it is, is the node's affair: a stage each, as long
    as there are enough."""
    places: dict[str, str] = {}
    for name, node in current.items():
        here = [device.name for device in topology.devices if device.node == node]
        if here:
            places[name] = min(here, key=list(places.values()).count)
    return places
