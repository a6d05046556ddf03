"""What there is to place stages on: nodes with their rack and zone, and devices with their memory; plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from functools import cached_property
from typing import Any

import msgspec

from flexpipe_serve.errors import ConfigError
from flexpipe_serve.planner.types import StageDevice

_ZONE_LABELS = ("ray.io/availability-zone", "zone")
_RACK_LABELS = ("rack",)


class DeviceKind(StrEnum):
    CPU = "cpu"
    CUDA = "cuda"


class Memory(msgspec.Struct, frozen=True, kw_only=True):
    """Memory of a device or node, in bytes."""

    total_bytes: int
    free_bytes: int
    """What others leave; what our own stages hold counts as free, for they can be moved."""


class Node(msgspec.Struct, frozen=True, kw_only=True):
    """A machine."""

    name: str
    """Ray's node id."""
    address: str = ""
    rack: str = ""
    """Nodes with the same rack and zone are close; nodes without a label count as one rack."""
    zone: str = ""
    is_alive: bool = True
    is_draining: bool = False
    """It will be taken away; nothing new goes there."""
    deadline: float | None = None
    """When it will be, on the clock of whoever asks; None: not known."""

    @property
    def is_usable(self) -> bool:
        """Whether a stage may be placed there."""
        return self.is_alive and not self.is_draining


class Device(msgspec.Struct, frozen=True, kw_only=True):
    """What a stage computes on; others may use a part of it."""

    name: str
    """Unique in the cluster."""
    node: str
    kind: DeviceKind
    compute: str
    """Stages with the same one take turns."""
    domain: str
    """Whose memory it takes; devices of one domain share it and state the same figures."""
    total_bytes: int
    free_bytes: int
    """See :class:`Memory`."""
    speed: float = 1.0
    """In units of the profiled device."""

    @property
    def is_whole(self) -> bool:
        """Nobody else uses it: at most a hundredth of its memory is taken (drivers and the like)."""
        return self.free_bytes >= 0.99 * self.total_bytes


class Topology(msgspec.Struct, frozen=True, kw_only=True, dict=True):
    """The cluster at one moment.

    Raises:
        ConfigError: a name occurs twice, a device's node is missing, or devices of one domain disagree on its memory.
    """

    nodes: tuple[Node, ...]
    devices: tuple[Device, ...]

    def __post_init__(self) -> None:
        for kind, names in (("node", [n.name for n in self.nodes]), ("device", [d.name for d in self.devices])):
            twice = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
            if twice:
                raise ConfigError(f"{kind} {twice[0]!r} occurs {names.count(twice[0])} times; names must be unique.")
        memory: dict[str, tuple[int, int]] = {}
        for device in self.devices:
            if device.node not in self._nodes:
                raise ConfigError(
                    f"device {device.name!r} stands on node {device.node!r}, which is not in the topology."
                )
            figures = (device.total_bytes, device.free_bytes)
            if memory.setdefault(device.domain, figures) != figures:
                raise ConfigError(
                    f"devices of domain {device.domain!r} share its memory but give (total, free) as"
                    f" {memory[device.domain]} and {figures} bytes; give the domain's figures for each."
                )

    @cached_property
    def _nodes(self) -> dict[str, Node]:
        return {node.name: node for node in self.nodes}

    @cached_property
    def _devices(self) -> dict[str, Device]:
        return {device.name: device for device in self.devices}

    def node(self, name: str) -> Node:
        """The node of that name; KeyError if there is none."""
        return self._nodes[name]

    def device(self, name: str) -> Device:
        """The device of that name; KeyError if there is none."""
        return self._devices[name]

    @property
    def usable_devices(self) -> tuple[Device, ...]:
        """Those on nodes that live and are not being drained."""
        return tuple(device for device in self.devices if self._nodes[device.node].is_usable)


def topology_from_ray(
    nodes: Sequence[Mapping[str, Any]],
    *,
    kind: DeviceKind,
    draining: Mapping[str, float | None] | None = None,
    memory: Mapping[str, Memory] | None = None,
    speeds: Mapping[str, float] | None = None,
) -> Topology:
    """The topology of a Ray cluster.

    A node has one CPU device, named as the node, or ``NODE/cuda:0``, ``NODE/cuda:1``, ... for its GPUs. Racks come
    from the label ``rack``, zones from ``ray.io/availability-zone`` or ``zone``.

    Args:
        nodes: as ``ray.nodes()`` gives them.
        kind: of the devices that stages are to stand on.
        draining: deadline by node id of those that are being drained; None where it is not known.
        memory: measured, by device name. Where it is missing, a CPU device has what Ray may give out
            (``Resources.memory``, all taken for free), and a GPU none, for Ray does not tell.
        speeds: by device name, in units of the profiled device; 1 by default.
    """
    draining, memory, speeds = draining or {}, memory or {}, speeds or {}
    found = []
    devices = []
    for entry in nodes:
        name = str(entry["NodeID"])
        labels: Mapping[str, str] = entry.get("Labels") or {}
        resources: Mapping[str, float] = entry.get("Resources") or {}
        found.append(
            Node(
                name=name,
                address=str(entry.get("NodeManagerAddress", "")),
                rack=_first(labels, _RACK_LABELS),
                zone=_first(labels, _ZONE_LABELS),
                is_alive=bool(entry["Alive"]),
                is_draining=name in draining,
                deadline=draining.get(name),
            )
        )
        if not entry["Alive"]:
            continue  # Ray keeps dead nodes in the list, without resources
        if kind is DeviceKind.CPU:
            names = [name]
            unknown = int(resources.get("memory", 0))
        else:
            names = [f"{name}/cuda:{i}" for i in range(int(resources.get("GPU", 0)))]
            unknown = 0
        for device in names:
            known = memory.get(device, Memory(total_bytes=unknown, free_bytes=unknown))
            devices.append(
                Device(
                    name=device,
                    node=name,
                    kind=kind,
                    compute=device,
                    domain=device,
                    total_bytes=known.total_bytes,
                    free_bytes=known.free_bytes,
                    speed=speeds.get(device, 1.0),
                )
            )
    return Topology(nodes=tuple(found), devices=tuple(devices))


def devices_for_planner(topology: Topology, *, overhead_bytes: int = 0) -> tuple[StageDevice, ...]:
    """The usable devices as the planner sees them.

    Args:
        overhead_bytes: what a stage's process takes beside weights and KV.
    """
    return tuple(
        StageDevice(
            name=device.name,
            node=device.node,
            compute=device.compute,
            domain=device.domain,
            memory_bytes=device.free_bytes,
            overhead_bytes=overhead_bytes,
            speed=device.speed,
        )
        for device in topology.usable_devices
    )


def _first(labels: Mapping[str, str], keys: Sequence[str]) -> str:
    return next((labels[key] for key in keys if labels.get(key)), "")
