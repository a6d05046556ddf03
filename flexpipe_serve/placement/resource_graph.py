"""FlexPipe's hierarchical resource graph (F26, F27): where stages were started lately, so that the next ones keep away.

A stage that starts loads weights over shared paths: its device's and node's bus, its rack's network, the cluster's
storage. Each start leaves a marker on all of them, which fades exponentially.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from enum import IntEnum
from typing import NamedTuple

from flexpipe_serve.placement.topology import Topology

DECAY_S = 60.0
"""A marker has faded to 1/e after so long; about what loading a stage takes (the paper gives no figure)."""
_FADED = 1e-3


class Level(IntEnum):
    """From the narrowest path to the widest."""

    DEVICE = 0
    NODE = 1
    RACK = 2
    CLUSTER = 3


class Vertex(NamedTuple):
    """Something that several starts may have to share."""

    level: Level
    name: str


Path = tuple[Vertex, ...]
"""What loading a device goes through, the device first."""

LEVEL_WEIGHTS: Mapping[Level, float] = {Level.DEVICE: 1.0, Level.NODE: 0.5, Level.RACK: 0.25, Level.CLUSTER: 0.125}
"""How much one marker counts: wider paths take more starts at once."""


def path_of(topology: Topology, device: str) -> Path:
    """The path of a device; KeyError if there is none of that name."""
    node = topology.node(topology.device(device).node)
    return (
        Vertex(Level.DEVICE, device),
        Vertex(Level.NODE, node.name),
        Vertex(Level.RACK, f"{node.zone}/{node.rack}"),
        Vertex(Level.CLUSTER, ""),
    )


class ResourceGraph:
    """The markers. Times are seconds on the caller's clock and need not rise; not safe for several threads.

    Args:
        decay_s: seconds in which a marker fades to 1/e.
    """

    def __init__(self, *, decay_s: float = DECAY_S) -> None:
        self._decay_s = decay_s
        self._loads: dict[Vertex, tuple[float, float]] = {}
        """For each vertex the sum of its markers at a time, and that time."""

    def copy(self) -> ResourceGraph:
        """One that can be changed, or read by another thread, without this one."""
        other = ResourceGraph(decay_s=self._decay_s)
        other._loads = dict(self._loads)
        return other

    def mark(self, path: Iterable[Vertex], at: float) -> None:
        """Note that a stage starts on the device at the beginning of ``path``."""
        for vertex in path:
            load, since = self._loads.get(vertex, (0.0, at))
            now = max(at, since)
            load = load * self._fade(now - since) + self._fade(now - at)
            self._loads[vertex] = (load, now)
        for vertex in [v for v in self._loads if self._load(v, at) < _FADED]:
            del self._loads[vertex]  # nodes come and go

    def congestion(self, path: Iterable[Vertex], at: float) -> float:
        """How busy a path is with starts: the sum over its vertices of markers times the weight of their level.

        1.875 right after one start on the same device, 0.875 on its node, 0.375 in its rack, 0.125 elsewhere.
        """
        return sum(LEVEL_WEIGHTS[vertex.level] * self._load(vertex, at) for vertex in path)

    def bottleneck(self, path: Iterable[Vertex], at: float) -> Vertex:
        """The vertex of a path that contributes most to its congestion; the widest of equal ones."""
        return max(path, key=lambda v: (LEVEL_WEIGHTS[v.level] * self._load(v, at), v.level))

    def _load(self, vertex: Vertex, at: float) -> float:
        load, since = self._loads.get(vertex, (0.0, at))
        return load * self._fade(max(0.0, at - since))

    def _fade(self, seconds: float) -> float:
        return math.exp(-seconds / self._decay_s)
