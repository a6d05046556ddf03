"""An allocation problem as arrays, and a partial solution of it that knows what each further step would gain."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from flexpipe_serve.placement.affinity import AffinityWeights, Hosting, affinity
from flexpipe_serve.placement.allocation import AllocationWeights, ScoreTerms, StageDemand
from flexpipe_serve.placement.resource_graph import ResourceGraph, path_of
from flexpipe_serve.placement.topology import Device, Topology

Floats = npt.NDArray[np.float64]
_Ints = npt.NDArray[np.int64]
_Bools = npt.NDArray[np.bool_]

NOWHERE = -1


class Problem:
    """Demands (rows, ``i``) against devices (columns, ``j``).

    Args: as for :func:`flexpipe_serve.placement.allocator.allocate`, which checks them; ``devices`` are the usable
        ones that are large enough for some demand.
    """

    def __init__(
        self,
        topology: Topology,
        devices: Sequence[Device],
        demands: Sequence[StageDemand],
        *,
        at: float,
        current: Mapping[str, str],
        tenants: Mapping[str, Collection[str]],
        hostings: Mapping[str, Collection[Hosting]],
        graph: ResourceGraph | None,
        anti_affinity: bool,
        max_imbalance: float | None,
        weights: AllocationWeights,
    ) -> None:
        self.demands = demands
        self.devices = devices
        self.weights = weights
        self.anti_affinity = anti_affinity
        self.max_imbalance = max_imbalance
        column = {device.name: j for j, device in enumerate(devices)}
        domains = {name: d for d, name in enumerate(dict.fromkeys(device.domain for device in devices))}
        self.domain: _Ints = np.array([domains[device.domain] for device in devices], dtype=np.int64)
        self.free: Floats = np.zeros(len(domains))
        for device in devices:
            self.free[domains[device.domain]] = device.free_bytes
        self.unit = max(1, *(device.total_bytes for device in topology.devices))
        """Bytes of the largest device."""
        self.need: Floats = np.array([demand.memory_bytes for demand in demands], dtype=np.float64)
        self.gamma: Floats = np.array([weights.gamma(demand.cv) for demand in demands])
        models = {name: m for m, name in enumerate(dict.fromkeys(demand.model for demand in demands))}
        self.model: _Ints = np.array([models[demand.model] for demand in demands], dtype=np.int64)
        self.num_models = len(models)
        pipelines = {name: p for p, name in enumerate(dict.fromkeys(demand.pipeline for demand in demands))}
        self.pipeline: _Ints = np.array([pipelines[demand.pipeline] for demand in demands], dtype=np.int64)
        self.neighbours: list[list[int]] = [[] for _ in demands]
        """The stages before and after each in its pipeline."""
        for p in pipelines.values():
            members = [int(i) for i in np.flatnonzero(self.pipeline == p)]
            for i, k in pairwise(members):
                self.neighbours[i].append(k)
                self.neighbours[k].append(i)
        # Rows node, rack, zone, each unique in the cluster: hops count the rows in which two devices differ.
        nodes = [topology.node(device.node) for device in devices]
        places = [(n.name, f"{n.zone}/{n.rack}", n.zone) for n in nodes]
        names = [np.unique(np.array(level), return_inverse=True)[1] for level in zip(*places, strict=True)]
        self.place: _Ints = np.array(names, dtype=np.int64)
        self._hop_costs: dict[int, Floats] = {}
        speed = np.array([device.speed for device in devices])
        self.rate: Floats = np.array([demand.rate for demand in demands])[:, None] * speed
        """[i, j]: requests a second (T of Eq 6)."""
        self.is_shared: _Bools = np.array([not d.is_whole or bool(tenants.get(d.name)) for d in devices])
        """By whom the demands know nothing of."""
        self.allowed: _Bools = self.free[self.domain] >= self.need[:, None]
        if anti_affinity:
            taken = np.array([[model in tenants.get(d.name, ()) for d in devices] for model in models], dtype=np.bool_)
            self.allowed &= ~taken[self.model]
        stays = np.zeros(self.rate.shape)
        for i, demand in enumerate(demands):
            if current.get(demand.name) in column:
                stays[i, column[current[demand.name]]] = 1.0
        # The parts that do not depend on where other stages are.
        fastest = max(device.speed for device in topology.devices)
        self.throughput: Floats = weights.throughput * np.tile(speed / fastest, (len(demands), 1))
        self.stay: Floats = weights.stay * stays
        busy = [graph.congestion(path_of(topology, d.name), at) for d in devices] if graph else [0.0] * len(devices)
        self.congestion: Floats = -weights.congestion * np.array(busy) * (1 - stays)
        fond = np.array([_affinities(hostings.get(model, ()), devices, at=at) for model in models])
        self.affinity: Floats = weights.affinity * fond[self.model]
        self.alone: Floats = self.throughput + self.stay + self.congestion + self.affinity
        """[i, j]: their sum."""

    def hop_costs(self, j: int) -> Floats:
        """Of the levels between device ``j`` and each device."""
        if j not in self._hop_costs:
            self._hop_costs[j] = self.weights.hop * (self.place != self.place[:, [j]]).sum(axis=0)
        return self._hop_costs[j]


def _affinities(hostings: Collection[Hosting], devices: Sequence[Device], *, at: float) -> list[float]:
    """Eq 13 for each device: that of its node."""
    available = {device.name for device in devices}
    by_node: dict[str, float] = {}
    for hosting in hostings:
        value = affinity(hosting, at=at, available=available, weights=AffinityWeights())
        by_node[hosting.node] = max(value, by_node.get(hosting.node, 0.0))
    return [by_node.get(device.node, 0.0) for device in devices]


class Solution:
    """Where demands are so far, and the score. Starts empty."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.score = 0.0
        self.at: list[int] = [NOWHERE] * len(problem.demands)
        """Device of each demand."""
        num_devices = len(problem.devices)
        self._free = problem.free.copy()
        self._num_in_domain = np.zeros(len(problem.free), dtype=np.int64)
        self._num_on = np.zeros(num_devices, dtype=np.int64)
        self._gamma_on = np.zeros(num_devices)
        self._num_of_model = np.zeros((problem.num_models, num_devices), dtype=np.int64)

    def copy(self) -> Solution:
        """One that can be changed without this one."""
        other = Solution(self.problem)
        other.score, other.at = self.score, list(self.at)
        for name in ("_free", "_num_in_domain", "_num_on", "_gamma_on", "_num_of_model"):
            setattr(other, name, getattr(self, name).copy())
        return other

    def gains(self, i: int) -> Floats:
        """What placing demand ``i``, which is nowhere yet, on each device would add to the score; -inf: impossible."""
        p = self.problem
        domain, weights, need = p.domain, p.weights, p.need[i]
        gains: Floats = p.alone[i].copy()
        # Sharing: its own, and that of the one who was alone there so far.
        gains -= p.gamma[i] * (p.is_shared | (self._num_on > 0))
        gains -= self._gamma_on * ((self._num_on == 1) & ~p.is_shared)
        # Memory left over counts only where something of ours is.
        left = np.where(self._num_in_domain > 0, -need, self._free - need)[domain]
        gains -= weights.fit / p.unit * left
        for k in p.neighbours[i]:
            if self.at[k] != NOWHERE:
                gains -= p.hop_costs(self.at[k])
        possible = p.allowed[i] & (self._free[domain] >= need)
        if p.anti_affinity:
            possible &= self._num_of_model[p.model[i]] == 0
        if p.max_imbalance is not None:
            possible &= self._is_balanced(i, 1 + p.max_imbalance)
        gains[~possible] = -np.inf
        return gains

    def _is_balanced(self, i: int, ratio: float) -> _Bools | np.bool_:
        """Eq 8 against the other stages of its pipeline that have a place."""
        p = self.problem
        others = [
            p.rate[k, self.at[k]]
            for k in np.flatnonzero(p.pipeline == p.pipeline[i])
            if k != i and self.at[k] != NOWHERE
        ]
        if not others:
            return np.True_
        balanced: _Bools = (p.rate[i] * ratio >= max(others)) & (p.rate[i] <= ratio * min(others))
        return balanced

    def put(self, i: int, j: int, gain: float) -> None:
        """Place demand ``i`` on device ``j``.

        Args:
            gain: as :meth:`gains` gave it.
        """
        self._change(i, j, 1)
        self.at[i] = j
        self.score += gain

    def take(self, i: int) -> tuple[int, Floats]:
        """Take demand ``i`` from its device; returns which it was, and the gains of placing it anew."""
        j = self.at[i]
        self.at[i] = NOWHERE
        self._change(i, j, -1)
        gains = self.gains(i)
        self.score -= gains[j]
        return j, gains

    def _change(self, i: int, j: int, sign: int) -> None:
        p = self.problem
        d = p.domain[j]
        self._free[d] -= sign * p.need[i]
        self._num_in_domain[d] += sign
        self._num_on[j] += sign
        self._gamma_on[j] += sign * p.gamma[i]
        self._num_of_model[p.model[i], j] += sign

    @property
    def free_bytes(self) -> Floats:
        """What is left of each device's domain."""
        free: Floats = self._free[self.problem.domain]
        return free

    @property
    def num_placed(self) -> int:
        """Demands that have a device."""
        return len(self.at) - self.at.count(NOWHERE)

    def terms(self) -> ScoreTerms:
        """The score of a complete solution, part by part."""
        p, at = self.problem, np.array(self.at)
        rows = np.arange(len(at))
        is_shared = p.is_shared | (self._num_on > 1)
        hops = sum(p.hop_costs(self.at[i])[self.at[k]] for i in rows for k in p.neighbours[i] if k > i)
        return ScoreTerms(
            throughput=float(p.throughput[rows, at].sum()),
            sharing=float(-(p.gamma * is_shared[at]).sum()),
            fit=float(-p.weights.fit / p.unit * self._free[self._num_in_domain > 0].sum()),
            congestion=float(p.congestion[rows, at].sum()),
            affinity=float(p.affinity[rows, at].sum()),
            hop=float(-hops),
            stay=float(p.stay[rows, at].sum()),
        )
