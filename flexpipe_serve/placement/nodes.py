"""Nodes as people and plans name them: pure code."""

from __future__ import annotations

from collections.abc import Collection

import msgspec

from flexpipe_serve.errors import InvalidRequestError
from flexpipe_serve.placement.topology import Device, DeviceKind, Node, Topology

_MIN_BEGINNING = 4
_MAX_SHOWN = 20


def find_node(text: str, topology: Topology, *, param: str) -> Node:
    """The node that lives and has this id, the only one whose id begins so, or the only one with this address.

    Args:
        param: the request's field to blame.

    Raises:
        InvalidRequestError: there is none, or there are several.
    """
    alive = [node for node in topology.nodes if node.is_alive]
    found = [node for node in alive if node.name == text]
    if not found and len(text) >= _MIN_BEGINNING:
        found = [node for node in alive if node.name.startswith(text)]
    if not found and text:
        found = [node for node in alive if node.address == text]
    if len(found) == 1:
        return found[0]
    known = ", ".join(f"{node.name} ({node.address})" if node.address else node.name for node in alive[:_MAX_SHOWN])
    what = f"{len(found)} nodes are meant by" if found else "No node that lives has the id or address"
    raise InvalidRequestError(f"{what} {text[:80]!r}; there are: {known}.", param=param)


def short_name(node: str) -> str:
    """For people: Ray's node ids have 56 digits."""
    return node if len(node) < 40 else f"{node[:8]}…"


def mark_draining(topology: Topology, nodes: Collection[str]) -> Topology:
    """The same with ``nodes``, by name, as being drained."""
    return msgspec.structs.replace(
        topology,
        nodes=tuple(
            msgspec.structs.replace(node, is_draining=True) if node.name in nodes else node for node in topology.nodes
        ),
    )


def usable_nodes(topology: Topology) -> tuple[str, ...]:
    """Names of the nodes where a stage may be placed."""
    return tuple(dict.fromkeys(device.node for device in topology.usable_devices))


def one_node_topology(name: str, *, kind: DeviceKind) -> Topology:
    """Of hosts that know one machine only, whose memory need not be known: every stage tells it."""
    device = Device(name=name, node=name, kind=kind, compute=name, domain=name, total_bytes=0, free_bytes=0)
    return Topology(nodes=(Node(name=name),), devices=(device,))
