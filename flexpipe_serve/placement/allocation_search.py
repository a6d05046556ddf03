"""How a good solution of an allocation problem is found: all of them tried where there are few, else greedy starts and
local search."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from flexpipe_serve.placement.allocation_problem import NOWHERE, Floats, Problem, Solution
from flexpipe_serve.placement.assignment import assign

EXACT_LIMIT = 2000
"""Up to so many ways of placing the stages, leaving out that they exclude each other, all are tried."""
_MAX_FLOORS = 32
_EPSILON = 1e-9
_FORBIDDEN = -1e6
"""Far below any score."""

_Worth = Callable[[Solution, Floats], Floats]
"""What each device is worth to a stage, given what placing it there gains."""


def is_small(problem: Problem) -> bool:
    """Whether the problem is solved exactly."""
    return math.prod(int(n) for n in problem.allowed.sum(axis=1)) <= EXACT_LIMIT


def solve_exactly(problem: Problem) -> Solution:
    """The best solution, or one of the largest that can be placed if not all can (branch and bound)."""
    order = _largest_first(problem)
    # No stage adds more than this, wherever the others are.
    relief = problem.weights.fit * problem.need / problem.unit
    most = np.where(problem.allowed, problem.alone, -np.inf).max(axis=1, initial=-np.inf) + relief
    bound = [float(most[order[depth:]].sum()) for depth in range(len(order) + 1)]
    best = Solution(problem)
    solution = Solution(problem)

    def descend(depth: int) -> None:
        nonlocal best
        if (depth, solution.score) > (best.num_placed, best.score):
            best = solution.copy()
        if depth == len(order) or (
            best.num_placed == len(order) and solution.score + bound[depth] < best.score + _EPSILON
        ):
            return
        i = order[depth]
        gains = solution.gains(i)
        for j in np.argsort(-gains, kind="stable"):
            if gains[j] == -np.inf:
                break
            solution.put(i, int(j), gains[j])
            descend(depth + 1)
            solution.take(i)

    descend(0)
    return best


def search(problem: Problem, current: Sequence[int]) -> Solution:
    """A good solution, or one of the largest found if not all stages could be placed.

    Args:
        current: device of each stage as it is now, or NOWHERE.
    """
    starts = [
        _greedy(problem, _largest_first(problem), _most_valued),
        _greedy(problem, range(len(current)), _most_valued),
        _one_each(problem),
    ]
    if NOWHERE not in current:
        starts.append(_as_it_is(problem, current))
    whole = [start for start in starts if start.num_placed == len(current)]
    if not whole:
        packed = _greedy(problem, _largest_first(problem), _tightest)
        if packed.num_placed < len(current):
            return max([*starts, packed], key=lambda solution: solution.num_placed)
        whole = [packed]
    for solution in whole:
        _improve(solution)
    return max(whole, key=lambda solution: solution.score)


def _largest_first(problem: Problem) -> list[int]:
    """Where each stage has a device of its own, what is large enough for one stage is so for all after it: taking any
    such device is safe."""
    return [int(i) for i in np.argsort(-problem.need, kind="stable")]


def _one_each(problem: Problem) -> Solution:
    """Each stage alone on a device, in the best way but for hops and balance; as many as can stay with these limits."""
    solution = Solution(problem)
    num_stages, num_devices = problem.allowed.shape
    if num_devices < num_stages:
        return solution
    values = problem.alone - problem.gamma[:, None] * problem.is_shared
    values -= problem.weights.fit / problem.unit * (problem.free[problem.domain] - problem.need[:, None])
    values[~problem.allowed] = _FORBIDDEN
    # As many devices as there are stages are enough for each of them to choose from.
    columns = np.unique(np.argpartition(-values, num_stages - 1, axis=1)[:, :num_stages])
    for i, column in enumerate(assign((-values[:, columns]).tolist())):
        j = int(columns[column])
        gain = solution.gains(i)[j]
        if gain > -np.inf:
            solution.put(i, j, gain)
    return solution


def _most_valued(_: Solution, gains: Floats) -> Floats:
    return gains


def _tightest(solution: Solution, gains: Floats) -> Floats:
    """Best fit: packs most, whatever it scores."""
    return np.where(gains > -np.inf, -solution.free_bytes, -np.inf)


def _greedy(problem: Problem, order: Sequence[int], worth: _Worth) -> Solution:
    """Each stage in turn to where it is worth most; those that find no room are left out."""
    solution = Solution(problem)
    if problem.max_imbalance is None:
        _place(solution, order, worth, problem.allowed)
        return solution
    # The first stage of a pipeline would decide how fast the others have to be: try each pace, pipeline by pipeline.
    for p in dict.fromkeys(int(problem.pipeline[i]) for i in order):
        members = [i for i in order if problem.pipeline[i] == p]
        tried = []
        for floor in _floors(problem, members):
            trial = solution.copy()
            in_pace = (problem.rate >= floor) & (problem.rate <= floor * (1 + problem.max_imbalance))
            _place(trial, members, worth, in_pace)
            tried.append(trial)
        solution = max(tried, key=lambda trial: (trial.num_placed, trial.score))
    return solution


def _place(solution: Solution, order: Sequence[int], worth: _Worth, mask: npt.NDArray[np.bool_]) -> None:
    for i in order:
        gains = solution.gains(i)
        values = np.where(mask[i], worth(solution, gains), -np.inf)
        j = int(np.argmax(values))
        if values[j] > -np.inf:
            solution.put(i, j, gains[j])


def _floors(problem: Problem, members: Sequence[int]) -> list[float]:
    """Rates that the slowest stage of a pipeline may have, the fastest first."""
    rates = np.unique(problem.rate[members][problem.allowed[members]])[::-1]
    if len(rates) > _MAX_FLOORS:
        rates = rates[np.linspace(0, len(rates) - 1, _MAX_FLOORS).round().astype(np.int64)]
    return [float(rate) for rate in rates]


def _as_it_is(problem: Problem, current: Sequence[int]) -> Solution:
    """Every stage where it stands, as far as it may stay there."""
    solution = Solution(problem)
    for i, j in enumerate(current):
        gain = solution.gains(i)[j]
        if gain > -np.inf:
            solution.put(i, j, gain)
    return solution


def _improve(solution: Solution) -> None:
    """Local search: move a stage, or let two change places, as long as that raises the score."""
    is_better = True
    while is_better:
        is_better = False
        for i in range(len(solution.at)):
            before, gains = solution.take(i)
            j = int(np.argmax(gains))
            if gains[j] <= gains[before] + _EPSILON:
                j = before
            solution.put(i, j, gains[j])
            is_better |= j != before
        is_better |= _swap(solution)


def _swap(solution: Solution) -> bool:
    """Make the exchanges that raise the score, those that promise most first; returns whether there was one."""
    promise = _promise_of_swaps(solution)
    pairs = np.argwhere(np.triu(promise, 1) > _EPSILON)
    has_swapped = False
    for i, k in sorted(((int(i), int(k)) for i, k in pairs), key=lambda pair: -promise[pair]):
        has_swapped |= _try_swap(solution, i, k)
    return has_swapped


def _try_swap(solution: Solution, i: int, k: int) -> bool:
    score = solution.score
    at_i, _ = solution.take(i)
    at_k, _ = solution.take(k)
    if at_i != at_k:
        gain = solution.gains(i)[at_k]
        if gain > -np.inf:
            solution.put(i, at_k, gain)
            gain = solution.gains(k)[at_i]
            if solution.score + gain > score + _EPSILON:
                solution.put(k, at_i, gain)
                return True
            solution.take(i)
    solution.put(i, at_i, solution.gains(i)[at_i])
    solution.put(k, at_k, solution.gains(k)[at_k])
    return False


def _promise_of_swaps(solution: Solution) -> Floats:
    """[i, k]: what it would gain if stages ``i`` and ``k`` changed places, were each alone on its device."""
    p = solution.problem
    at = np.array(solution.at)
    there = p.alone[:, at]
    """[i, k]: of stage i at the place of k."""
    is_shared = p.is_shared[at]
    hops = np.array([p.hop_costs(j)[at] for j in solution.at])
    is_neighbour = np.zeros(hops.shape)
    for i, others in enumerate(p.neighbours):
        is_neighbour[i, others] = 1
    cost = there - p.gamma[:, None] * is_shared - is_neighbour @ hops
    gain = cost - cost.diagonal()[:, None]
    # The distance between neighbours stays the same; the sums above have it shrink to nothing.
    promise: Floats = gain + gain.T - 2 * is_neighbour * hops
    promise[~(p.allowed[:, at] & p.allowed[:, at].T)] = -np.inf
    return promise
