"""Which devices the stages of one or more pipelines get (FlexPipe's Eq 6-9, 12 and 13; F13, F14, F29): pure code."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from flexpipe_serve.errors import ConfigError
from flexpipe_serve.placement.affinity import Hosting
from flexpipe_serve.placement.allocation import Allocation, AllocationWeights, Deadline, Refusal, StageDemand
from flexpipe_serve.placement.allocation_problem import NOWHERE, Problem, Solution
from flexpipe_serve.placement.allocation_search import is_small, search, solve_exactly
from flexpipe_serve.placement.deadline import PipelineStart, num_servable
from flexpipe_serve.placement.resource_graph import ResourceGraph
from flexpipe_serve.placement.topology import Device, Topology

_GIB = 2**30
_FASTEST = AllocationWeights(sharing=0.0, fit=0.0, congestion=0.0, affinity=0.0, hop=0.0, stay=0.0)


def allocate(
    topology: Topology,
    demands: Sequence[StageDemand],
    *,
    at: float,
    current: Mapping[str, str] | None = None,
    tenants: Mapping[str, Collection[str]] | None = None,
    hostings: Mapping[str, Collection[Hosting]] | None = None,
    graph: ResourceGraph | None = None,
    anti_affinity: bool = True,
    max_imbalance: float | None = None,
    deadline: Deadline | None = None,
    weights: AllocationWeights | None = None,
) -> Allocation | Refusal:
    """Give each stage a device with room for it, on a node that lives and is not being drained.

    Of all ways it takes the one with the best score, exactly where there are few stages and devices, else by greedy
    starts and local search. The score (:class:`ScoreTerms`) is Eq 6's objective with Eq 9's price of sharing, and what
    the paper's text adds: affinity (Eq 13), markers of the resource graph; beside it memory left over, hops, and
    stages that stay. Eq 7 (memory) and Eq 8 (balance, if asked for) are limits. Eq 6 divides throughput by
    memory; a stage's memory is the same on every device, so speed decides.

    Args:
        at: now, in seconds, for what fades.
        current: device by demand name of the stages that stand somewhere; their memory counts as free there.
        tenants: models that have a stage on a device which is not among the demands, by device.
        hostings: which nodes served a model lately, by model.
        graph: markers of recent starts.
        anti_affinity: two stages of one model never share a device (F14). Switch it off where there is one only.
        max_imbalance: Eq 8's epsilon: how much faster the fastest stage of a pipeline may be than the slowest.
        deadline: Eq 12; if the best allocation cannot make it, the fastest one is tried.

    Raises:
        ConfigError: no demands, or two of one name.
    """
    names = [demand.name for demand in demands]
    if not demands or len(set(names)) < len(names):
        raise ConfigError(f"{len(names)} stage demands with {len(set(names))} names; give at least one, names unique.")
    usable = topology.usable_devices
    smallest = min(demand.memory_bytes for demand in demands)
    devices = [device for device in usable if device.free_bytes >= smallest]
    refuse = _Refuser(topology, usable, demands, tenants=tenants or {}, anti_affinity=anti_affinity)
    if reason := refuse.why_impossible():
        return refuse(reason, num_placed=0, is_proven=True)
    current = current or {}
    columns = {device.name: j for j, device in enumerate(devices)}
    places = [columns.get(current.get(name, ""), NOWHERE) for name in names]

    def solve(weights: AllocationWeights) -> tuple[Solution, bool]:
        problem = Problem(
            topology,
            devices,
            demands,
            at=at,
            current=current,
            tenants=tenants or {},
            hostings=hostings or {},
            graph=graph,
            anti_affinity=anti_affinity,
            max_imbalance=max_imbalance,
            weights=weights,
        )
        is_exact = is_small(problem)
        return (solve_exactly(problem) if is_exact else search(problem, places)), is_exact

    solution, is_exact = solve(weights or AllocationWeights())
    if solution.num_placed < len(demands):
        return refuse(refuse.why_not_together(max_imbalance), num_placed=solution.num_placed, is_proven=is_exact)
    if deadline is not None and _num_servable(solution, places, at=at, deadline=deadline) < deadline.num_due:
        fastest, _ = solve(_FASTEST)
        if fastest.num_placed == len(demands):
            solution, is_exact = fastest, False
        possible = _num_servable(solution, places, at=at, deadline=deadline)
        if possible < deadline.num_due:
            reason = (
                f"{deadline.num_due:g} requests are due within {deadline.at - at:.1f} s, but these stages could serve"
                f" {possible:.1f} until then; take more stages, which load sooner, more pipelines, or a later deadline."
            )
            return refuse(reason, num_placed=len(demands), is_proven=False)
    return Allocation(devices=tuple(devices[j].name for j in solution.at), terms=solution.terms(), is_exact=is_exact)


def _num_servable(solution: Solution, places: Sequence[int], *, at: float, deadline: Deadline) -> float:
    """Requests served by the deadline; stages that stay need no setup."""
    problem = solution.problem
    starts = []
    for pipeline in sorted(set(problem.pipeline)):
        stages = [i for i in range(len(places)) if problem.pipeline[i] == pipeline]
        starts.append(
            PipelineStart(
                setup_s=max(problem.demands[i].setup_s if solution.at[i] != places[i] else 0.0 for i in stages),
                rate=min(float(problem.rate[i, solution.at[i]]) for i in stages),
            )
        )
    return num_servable(starts, seconds=deadline.at - at)


class _Refuser:
    """Says why there is no room."""

    def __init__(
        self,
        topology: Topology,
        usable: Sequence[Device],
        demands: Sequence[StageDemand],
        *,
        tenants: Mapping[str, Collection[str]],
        anti_affinity: bool,
    ) -> None:
        self._topology = topology
        self._usable = usable
        self._demands = demands
        self._tenants = tenants
        self._anti_affinity = anti_affinity
        self._needed = sum(demand.memory_bytes for demand in demands)
        self._free = sum({device.domain: device.free_bytes for device in usable}.values())

    def __call__(self, reason: str, *, num_placed: int, is_proven: bool) -> Refusal:
        return Refusal(
            reason=reason,
            num_stages=len(self._demands),
            num_placed=num_placed,
            needed_bytes=self._needed,
            free_bytes=self._free,
            is_proven=is_proven,
        )

    def why_impossible(self) -> str | None:
        """A reason that needs no search to be seen; None: there may be room."""
        if not self._usable:
            nodes = self._topology.nodes
            return (
                f"none of {len(nodes)} nodes has a device that can be used: {sum(not n.is_alive for n in nodes)} are"
                f" down, {sum(n.is_draining for n in nodes)} are being drained; add nodes."
            )
        largest = max(self._demands, key=lambda demand: demand.memory_bytes)
        roomiest = max(self._usable, key=lambda device: device.free_bytes)
        if largest.memory_bytes > roomiest.free_bytes:
            return (
                f"stage {largest.name!r} takes {largest.memory_bytes / _GIB:.2f} GiB, but the largest free device"
                f" ({roomiest.name!r}) has {roomiest.free_bytes / _GIB:.2f} GiB; cut the model into more stages."
            )
        if self._anti_affinity:
            for model in dict.fromkeys(demand.model for demand in self._demands):
                if reason := self._why_no_devices_of_their_own(model):
                    return reason
        if self._needed > self._free:
            return (
                f"{len(self._demands)} stages take {self._needed / _GIB:.2f} GiB, but {len(self._usable)} devices have"
                f" {self._free / _GIB:.2f} GiB free in all; use fewer pipelines or less KV."
            )
        return None

    def _why_no_devices_of_their_own(self, model: str) -> str | None:
        # The k-th largest stage needs a k-th device that is large enough for it.
        needs = sorted((d.memory_bytes for d in self._demands if d.model == model), reverse=True)
        rooms = [d.free_bytes for d in self._usable if model not in self._tenants.get(d.name, ())]
        for k, need in enumerate(needs, 1):
            num_large = sum(room >= need for room in rooms)
            if num_large < k:
                return (
                    f"{k} stages of model {model!r} take at least {need / _GIB:.2f} GiB each on a device of their own,"
                    f" but {num_large} devices have so much free; cut the model into more stages, or switch"
                    " anti_affinity off if they may share devices."
                )
        return None

    def why_not_together(self, max_imbalance: float | None) -> str:
        """After the search has failed."""
        within = f" whose stages differ by at most {max_imbalance:.0%} in rate" if max_imbalance is not None else ""
        return (
            f"{len(self._demands)} stages with {self._needed / _GIB:.2f} GiB in all fit one by one, but no allocation"
            f"{within} was found for all of them on {len(self._usable)} devices with {self._free / _GIB:.2f} GiB free;"
            " use smaller stages or fewer pipelines."
        )
