"""FlexPipe's formulas (Eq 1, 4, 5, 9, 11, 12), to compare with: what the paper leaves out is chosen here, and said.

The paper gives no values for alpha, sigma, beta, gamma, nor for the CV at which a granularity is best.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple


class FlexPipeWeights(NamedTuple):
    """Values that the paper leaves out."""

    alpha: float = 0.5
    """Eq 4: throughput against latency, weighed alike."""
    sigma: float = 2.0
    """Eq 4: how far off in CV a granularity may be; the distance of the paper's own settings 2 and 4."""
    beta1: float = 1.0
    beta2: float = 0.0
    """Eq 5: no discount for stages."""
    gamma0: float = 0.01
    sharing_alpha: float = 0.1
    """Eq 9: at CV 8 sharing costs 0.07 of a score that is at most 1."""
    queue_gamma: float = 1.0
    """Eq 11."""
    queue_max: int = 64
    """Eq 11: Q_max, as many as a pipeline computes for at once."""


def queueing_score(*, rate: float, service_rates: Sequence[float], arrival_cv: float, service_cv: float) -> float:
    """Eq 1, "extended G/G/S": ``rho^S / (S! (1-rho)) * (CV_a^2 + CV_s^2) / 2 + sum lambda / (mu_i - lambda)``.

    The first term has no unit and the second is a number in the system, not a time: it ranks, and predicts nothing.

    Args:
        rate: lambda, requests a second.
        service_rates: mu_i of each stage; rho is lambda over the least of them.

    Returns:
        The lower the better; infinite from the slowest stage's rate on.
    """
    rho = rate / min(service_rates)
    if rho >= 1:
        return math.inf
    num_stages = len(service_rates)
    waiting = math.exp(num_stages * math.log(rho) - math.lgamma(num_stages + 1)) / (1 - rho) if rho else 0.0
    return waiting * (arrival_cv**2 + service_cv**2) / 2 + sum(rate / (mu - rate) for mu in service_rates)


def num_stages_for_cv(cv: float, *, coarsest: int, max_stages: int) -> int:
    """The paper's rule of thumb: stages in proportion to ``sqrt(CV)``; here ``coarsest`` at CV 1 and below."""
    return min(max_stages, max(coarsest, round(coarsest * math.sqrt(cv))))


def best_cv(num_stages: int, *, coarsest: int) -> float:
    """``nu_k``, the CV at which a granularity is best. The paper has it profiled; here the rule of thumb is inverted:
    ``(S / coarsest)^2``."""
    return (num_stages / coarsest) ** 2


def granularity_score(
    *,
    throughput: float,
    max_throughput: float,
    latency: float,
    min_latency: float,
    cv: float,
    best_cv: float,
    weights: FlexPipeWeights,
) -> float:
    """Eq 4: ``(alpha T_k / T_max + (1-alpha) L_min / L_k) * exp(-|nu_t - nu_k| / sigma)``; 0 to 1, higher is better."""
    worth = weights.alpha * throughput / max_throughput + (1 - weights.alpha) * min_latency / latency
    return worth * math.exp(-abs(cv - best_cv) / weights.sigma)


def num_replicas(
    *, total_rate: float, throughput: float, num_stages: int, max_replicas: int, weights: FlexPipeWeights
) -> int:
    """Eq 5: ``floor(mu_total / mu_k)`` with ``mu_k = T_k / (beta1 + beta2 * stages)``; 1 to ``max_replicas``.

    The paper's floor leaves the rest of the demand unserved.
    """
    rate_of_one = throughput / (weights.beta1 + weights.beta2 * num_stages)
    return max(1, min(max_replicas, math.floor(total_rate / rate_of_one)))


def sharing_penalty(cv: float, weights: FlexPipeWeights) -> float:
    """Eq 9: ``gamma0 (1 + alpha CV^2)``, what it costs to share a device."""
    return weights.gamma0 * (1 + weights.sharing_alpha * cv * cv)


def scaling_stages(*, cv: float, num_waiting: int, max_stages: int, coarsest: int, weights: FlexPipeWeights) -> int:
    """Eq 11: ``floor(G_max / (1 + beta exp(-gamma CV q)))`` with ``q = min(waiting / Q_max, 1)``.

    beta is chosen so that an empty queue asks for ``coarsest`` stages. The floor never reaches ``max_stages`` where
    coarsest is less: the sigmoid only tends to it.
    """
    beta = max_stages / coarsest - 1
    fill = min(num_waiting / weights.queue_max, 1.0)
    # An exact quotient must not fall short by rounding.
    return math.floor(max_stages / (1 + beta * math.exp(-weights.queue_gamma * cv * fill)) + 1e-9)


def meets_deadline(*, deadline_s: float, init_s: float, rates: Sequence[float], num_due: float) -> bool:
    """Eq 12 in units that work: ``(T - S) * sum mu_k >= r``. The paper divides by the queue, which must be a
    normaliser.

    Args:
        rates: requests a second of each new pipeline.
        num_due: requests that have to be served by the deadline.
    """
    return max(0.0, deadline_s - init_s) * sum(rates) >= num_due
