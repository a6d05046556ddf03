"""Where the pipelines of an application have stages, and had them: what the next choice of nodes goes by."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Mapping

from flexpipe_serve.placement.affinity import Hosting
from flexpipe_serve.placement.resource_graph import ResourceGraph, path_of
from flexpipe_serve.placement.topology import Topology

_KEPT_S = 3600.0
"""A hosting is forgotten after so long; Eq 13 has let it fade by then."""


class Placements:
    """One for all pipelines of an application; any thread may call its methods. Times are on one clock."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._graph = ResourceGraph()
        self._stages: dict[str, dict[str, str]] = {}
        """Node by stage, for each pipeline."""
        self._used_at: dict[str, float] = {}
        """When a stage last stood on a node."""
        self._cached_shares: dict[str, float] = {}

    def note(
        self, pipeline: str, node_of: Mapping[str, str], *, at: float, cached_shares: Mapping[str, float] | None = None
    ) -> None:
        """Say where a pipeline's stages stand.

        Args:
            node_of: of all its stages; empty when it has ended.
            cached_shares: share of the model's weights in a node's host cache, of nodes where that is known.
        """
        with self._lock:
            before = self._stages.get(pipeline, {})
            self._stages[pipeline] = dict(node_of)
            for node in {*before.values(), *node_of.values()}:
                self._used_at[node] = at
            self._cached_shares.update(cached_shares or {})
            for node in [node for node, used_at in self._used_at.items() if at - used_at > _KEPT_S]:
                del self._used_at[node]
                self._cached_shares.pop(node, None)

    def mark(self, topology: Topology, nodes: Iterable[str], *, at: float) -> None:
        """Leave a marker for each stage that starts now, by its node."""
        device_on = {device.node: device.name for device in reversed(topology.devices)}
        with self._lock:
            for node in nodes:
                if node in device_on:
                    self._graph.mark(path_of(topology, device_on[node]), at)

    def graph(self) -> ResourceGraph:
        """The markers as they are now."""
        with self._lock:
            return self._graph.copy()

    def congestion(self, topology: Topology, *, at: float) -> dict[str, float]:
        """How busy each node with devices is with starts; see ResourceGraph.congestion."""
        graph = self.graph()
        busy: dict[str, float] = {}
        for device in topology.devices:
            busy.setdefault(device.node, graph.congestion(path_of(topology, device.name), at))
        return busy

    def hostings(self, topology: Topology) -> tuple[Hosting, ...]:
        """The nodes that served the model lately."""
        with self._lock:
            return tuple(
                Hosting(
                    node=node,
                    devices=frozenset(device.name for device in topology.devices if device.node == node),
                    last_used_at=used_at,
                    cached_share=self._cached_shares.get(node, 0.0),
                )
                for node, used_at in self._used_at.items()
            )

    def num_stages_of_others(self, pipeline: str) -> dict[str, int]:
        """Stages of the other pipelines, by node."""
        with self._lock:
            return Counter(
                node for other, node_of in self._stages.items() if other != pipeline for node in node_of.values()
            )

    def num_pipelines_of_others(self, pipeline: str) -> dict[str, int]:
        """How many other pipelines have stages there, by node."""
        with self._lock:
            return Counter(
                node for other, node_of in self._stages.items() if other != pipeline for node in {*node_of.values()}
            )
