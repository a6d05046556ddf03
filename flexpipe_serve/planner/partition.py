"""Where to cut the layers when it is settled which device takes which slice: exact, pure code (F2-F4).

Times are whole picoseconds in here, so that equal sums are equal and a tie is a tie.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from flexpipe_serve.planner.profile import ModelProfile, StepShape
from flexpipe_serve.planner.types import StageDevice

_Int64 = npt.NDArray[np.int64]
_Float64 = npt.NDArray[np.float64]

_PICOSECONDS = 1e12
_SLACKS = (1.03, 1.12, 1.4, 2.0, 4.0)
"""Bounds to try for the bottleneck, in units of what no split can beat: the tighter, the less there is to search."""


def best_boundaries(
    profile: ModelProfile, devices: Sequence[StageDevice], shape: StepShape, *, num_kv_tokens: int = 0
) -> tuple[int, ...] | None:
    """The split that sustains most: device ``i`` takes the ``i``-th slice.

    Stages of one ``compute`` take turns, those of different ones work at the same time, so what bounds throughput is
    the largest sum of stage seconds over one compute. That is minimised; among equals the time of a pass, the sum over
    all stages (hops are as many whatever the boundaries are); among equals the sum of squares of the stages' times,
    which evens out the stages that share a compute.

    Exact. 128 layers on 32 devices of their own take some 10 ms, four times that where neighbours share a compute.
    Many alternations (A, B, A, B, ...) take far longer: 128 layers on 8 such stages a second.

    Args:
        devices: one for each stage, in order. Those with the same ``domain`` share ``memory_bytes`` of the first.
        shape: the step that the split is to be good at.
        num_kv_tokens: every domain must have room for the KV of so many tokens in its layers, beside the weights and
            the processes of its stages.

    Returns:
        The first layer of each later stage; None where there is no such split: memory does not suffice, or there are
        more devices than layers.
    """
    problem = _make_problem(profile, devices, shape, num_kv_tokens=num_kv_tokens)
    if problem.num_layers < problem.num_stages:
        return None
    if len(problem.last_of_compute) == 1:  # the total is the bottleneck
        found = _search(problem, problem.bounds()[-1], by_total=True)
        return None if found is None else found.boundaries
    for bound in problem.bounds():
        found = _search(problem, bound, by_total=False)
        if found is not None:
            best = _search(problem, found.bottleneck, by_total=True)
            assert best is not None
            return best.boundaries
    return None


def eq2_boundaries(
    profile: ModelProfile,
    devices: Sequence[StageDevice],
    shape: StepShape,
    *,
    bytes_per_s: float,
    refactor_weight: float,
    cuts_to_keep: Collection[int],
    cycle_s: float | None = None,
) -> tuple[int, ...] | None:
    """FlexPipe's Eq 2: minimises the sum over stages of ``|t_c + s_p / B - C| + lambda * R``, as the paper has it.

    It knows neither KV nor hops, and its weights must fit each device alone. The paper's R prefers cuts where stages
    can be merged later; it gives no formula. Here a stage has R = 1 where it starts at a cut that the granularities it
    may be refactored to do not have, else 0.

    Args:
        bytes_per_s: B.
        refactor_weight: lambda, seconds.
        cuts_to_keep: boundaries of those granularities, such as the finest of a ladder.
        cycle_s: C; the mean of ``t_c + s_p / B`` over the stages by default.

    Returns:
        The first layer of each later stage; None where nothing fits.
    """
    num_layers, num_stages = profile.num_layers, len(devices)
    problem = _make_problem(profile, devices, shape, num_kv_tokens=0)
    edges = np.arange(num_layers + 1)
    foreign = np.array([0.0 if edge == 0 or edge in cuts_to_keep else 1.0 for edge in edges])
    weights = _sums(np.array(profile.layer_bytes))
    ends = np.zeros(num_stages)
    ends[0] += profile.embedding_bytes
    ends[-1] += profile.head_bytes
    if cycle_s is None:
        # What each stage would take if all layers were spread evenly over the devices.
        work = sum(problem.seconds[i][-1] / num_stages + problem.fixed[i] for i in range(num_stages)) / _PICOSECONDS
        cycle_s = (work + (weights[-1] + ends.sum()) / bytes_per_s) / num_stages
    best = np.full(num_layers + 1, np.inf)
    best[0] = 0.0
    parents = []
    for i, device in enumerate(devices):
        seconds = (problem.seconds[i][None, :] - problem.seconds[i][:, None] + problem.fixed[i]) / _PICOSECONDS
        num_bytes = weights[None, :] - weights[:, None] + ends[i]
        cost = np.abs(seconds + num_bytes / bytes_per_s - cycle_s) + refactor_weight * foreign[:, None]
        cost[(edges[None, :] <= edges[:, None]) | (num_bytes > device.memory_bytes - device.overhead_bytes)] = np.inf
        sums = best[:, None] + cost
        parents.append(np.argmin(sums, axis=0))
        best = sums[parents[-1], edges]
    if not np.isfinite(best[num_layers]):
        return None
    return _walk_back(parents, num_layers)


@dataclass(frozen=True, kw_only=True)
class _Problem:
    """Stage ``i`` with layers ``a`` to ``b`` takes ``seconds[i][b] - seconds[i][a] + fixed[i]`` of its compute and
    ``num_bytes[b] - num_bytes[a] + fixed_bytes[i]`` of its domain. Stages count from 0, as computes and domains do."""

    num_layers: int
    num_stages: int
    seconds: list[_Int64]
    fixed: list[int]
    """With embedding and head: the first stage always has the one, the last the other."""
    work: _Int64
    """The layers' time at speed 1, summed up."""
    speeds: list[float]
    num_bytes: _Int64
    fixed_bytes: list[int]
    computes: list[int]
    """By stage."""
    domains: list[int]
    memory: list[int]
    """By domain."""
    last_of_compute: dict[int, int] = field(default_factory=dict)
    last_of_domain: dict[int, int] = field(default_factory=dict)

    def capacity(self, first: int) -> tuple[float, dict[int, float]]:
        """What stages ``first`` and later can do within a bound: the fixed part of their computes, in work of speed 1,
        and the speed by compute, so that it is ``sum((bound - used[c]) * speed[c]) - fixed`` at most."""
        speed: dict[int, float] = {}
        for i in range(first, self.num_stages):
            speed[self.computes[i]] = max(speed.get(self.computes[i], 0.0), self.speeds[i])
        fixed = sum(self.fixed[i] * speed[self.computes[i]] for i in range(first, self.num_stages))
        return fixed, speed

    def bounds(self) -> list[int]:
        """Rising; the last is none."""
        fixed, speed = self.capacity(0)
        least = (int(self.work[-1]) + fixed) / sum(speed.values())
        no_bound = sum(int(seconds[-1]) for seconds in self.seconds) + sum(self.fixed)
        return [*(int(least * slack) for slack in _SLACKS), no_bound]


def _make_problem(
    profile: ModelProfile, devices: Sequence[StageDevice], shape: StepShape, *, num_kv_tokens: int
) -> _Problem:
    layers = np.array(profile.layer_scale) * profile.layer_seconds(shape) * _PICOSECONDS
    # Rounded layer by layer: any two equal layers are equal, also after a sum.
    by_speed = {device.speed: _sums(np.rint(layers / device.speed)) for device in devices}
    fixed = [profile.stage_s] * len(devices)
    fixed[0] += profile.embedding.at(shape.num_tokens)
    fixed[-1] += profile.head.at(shape.num_samples)
    kv_bytes = profile.kv_bytes_per_token * num_kv_tokens
    fixed_bytes = [device.overhead_bytes for device in devices]
    fixed_bytes[0] += profile.embedding_bytes
    fixed_bytes[-1] += profile.head_bytes
    computes = {name: c for c, name in enumerate(dict.fromkeys(device.compute for device in devices))}
    domains = {name: d for d, name in enumerate(dict.fromkeys(device.domain for device in devices))}
    memory = {device.domain: device.memory_bytes for device in reversed(devices)}
    return _Problem(
        num_layers=profile.num_layers,
        num_stages=len(devices),
        seconds=[by_speed[device.speed] for device in devices],
        fixed=[round(s / device.speed * _PICOSECONDS) for s, device in zip(fixed, devices, strict=True)],
        work=_sums(np.rint(layers)),
        speeds=[device.speed for device in devices],
        num_bytes=_sums(np.array(profile.layer_bytes) + kv_bytes),
        fixed_bytes=fixed_bytes,
        computes=[computes[device.compute] for device in devices],
        domains=[domains[device.domain] for device in devices],
        memory=[memory[name] for name in domains],
        last_of_compute={computes[device.compute]: i for i, device in enumerate(devices)},
        last_of_domain={domains[device.domain]: i for i, device in enumerate(devices)},
    )


def _sums(values: npt.NDArray[Any]) -> _Int64:
    """Of the first 0, 1, ... values."""
    return np.concatenate([[0], np.cumsum(values)]).astype(np.int64)


@dataclass(frozen=True)
class _Found:
    boundaries: tuple[int, ...]
    bottleneck: int


@dataclass
class _Partials:
    """Splits of the first layers among the first stages, one an element. Of those that end at the same layer and leave
    the same to the stages to come, only the best is kept."""

    end: _Int64
    used: dict[int, _Int64]
    """Picoseconds by compute that later stages share."""
    used_bytes: dict[int, _Int64]
    """Bytes by domain that later stages share."""
    bottleneck: _Int64
    """Of the computes that are through."""
    total: _Int64
    unevenness: _Float64


def _search(problem: _Problem, bound: int, *, by_total: bool) -> _Found | None:
    """The best split whose bottleneck is at most ``bound``: the one with the least bottleneck, or ``by_total`` the one
    with the least total and then the least unevenness. None: there is none."""
    zero = np.zeros(1, np.int64)
    partials = _Partials(zero, {}, {}, zero, zero, np.zeros(1))
    starts, parents = [], []
    for stage in range(problem.num_stages):
        starts.append(partials.end)
        partials, parent = _extend(problem, partials, stage, bound, by_total)
        parents.append(parent)
        if not len(partials.end):
            return None
    assert len(partials.end) == 1
    boundaries = []
    index = 0
    for start, parent in zip(reversed(starts), reversed(parents), strict=True):
        index = int(parent[index])
        boundaries.append(int(start[index]))
    return _Found(tuple(reversed(boundaries[:-1])), int(partials.bottleneck[0]))


def _extend(
    problem: _Problem, old: _Partials, stage: int, bound: int, by_total: bool
) -> tuple[_Partials, npt.NDArray[np.intp]]:
    """All ways to give ``stage`` its slice; and from which element of ``old`` each comes."""
    compute, domain = problem.computes[stage], problem.domains[stage]
    seconds, fixed, fixed_bytes = problem.seconds[stage], problem.fixed[stage], problem.fixed_bytes[stage]
    used = old.used.get(compute, 0)
    used_bytes = old.used_bytes.get(domain, 0)
    # The furthest layer that time and memory allow, and the nearest one that the stages to come can go on from.
    num_to_come = problem.num_stages - stage - 1
    furthest = np.minimum(
        np.searchsorted(seconds, seconds[old.end] + (bound - fixed - used), "right"),
        np.searchsorted(
            problem.num_bytes, problem.num_bytes[old.end] + (problem.memory[domain] - fixed_bytes - used_bytes), "right"
        ),
    )
    furthest = np.minimum(furthest - 1, problem.num_layers - num_to_come)
    nearest = old.end + 1 if num_to_come else np.full_like(old.end, problem.num_layers)
    num_ends = np.maximum(furthest - nearest + 1, 0)
    parent = np.repeat(np.arange(len(old.end)), num_ends)
    offset = np.arange(len(parent)) - np.repeat(np.cumsum(num_ends) - num_ends, num_ends)
    end = nearest[parent] + offset
    time = seconds[end] - seconds[old.end[parent]] + fixed
    new = _Partials(
        end=end,
        used={c: u[parent] for c, u in old.used.items()},
        used_bytes={d: u[parent] for d, u in old.used_bytes.items()},
        bottleneck=old.bottleneck[parent],
        total=old.total[parent] + time,
        unevenness=old.unevenness[parent] + (time / _PICOSECONDS) ** 2,
    )
    spent = new.used.pop(compute, 0) + time
    if problem.last_of_compute[compute] == stage:
        new.bottleneck = np.maximum(new.bottleneck, spent)
    else:
        new.used[compute] = spent
    spent_bytes = (
        new.used_bytes.pop(domain, 0) + problem.num_bytes[end] - problem.num_bytes[old.end[parent]] + fixed_bytes
    )
    if problem.last_of_domain[domain] != stage:
        new.used_bytes[domain] = spent_bytes
    return _prune(problem, new, parent, stage + 1, bound, by_total)


def _prune(
    problem: _Problem, new: _Partials, parent: npt.NDArray[np.intp], stage: int, bound: int, by_total: bool
) -> tuple[_Partials, npt.NDArray[np.intp]]:
    """Drop what the stages from ``stage`` on cannot finish within the bound, and all but the best of those alike."""
    fixed, speed = problem.capacity(stage)
    capacity = np.full(len(new.end), bound * sum(speed.values()) - fixed)
    for c, spent in new.used.items():
        capacity -= spent * speed[c]
    # Times are rounded for each speed by itself: what only that puts beyond the bound must not be cut off.
    rounding = (1 + max(problem.speeds)) * (problem.num_layers + problem.num_stages)
    hopeful = np.flatnonzero(problem.work[-1] - problem.work[new.end] <= capacity + rounding)
    alike = [new.end[hopeful], *(u[hopeful] for u in (*new.used.values(), *new.used_bytes.values()))]
    worth = [new.unevenness[hopeful], new.total[hopeful]] if by_total else [new.bottleneck[hopeful]]
    order = np.lexsort([*worth, *reversed(alike)])
    is_first = np.ones(len(order), bool)
    if len(order):
        is_first[1:] = np.any([a[order][1:] != a[order][:-1] for a in alike], axis=0)
    kept = hopeful[order[is_first]]
    partials = _Partials(
        end=new.end[kept],
        used={c: u[kept] for c, u in new.used.items()},
        used_bytes={d: u[kept] for d, u in new.used_bytes.items()},
        bottleneck=new.bottleneck[kept],
        total=new.total[kept],
        unevenness=new.unevenness[kept],
    )
    return partials, parent[kept]


def _walk_back(parents: Sequence[npt.NDArray[np.intp]], num_layers: int) -> tuple[int, ...]:
    """Boundaries from the best start of each stage by its end."""
    edge = num_layers
    boundaries = []
    for parent in reversed(parents):
        edge = int(parent[edge])
        boundaries.append(edge)
    return tuple(reversed(boundaries[:-1]))
