"""FlexPipe's Eq 13 (F29): a host that served the model lately still has what makes a start quick."""

from __future__ import annotations

import math
from collections.abc import Collection

import msgspec


class Hosting(msgspec.Struct, frozen=True, kw_only=True):
    """What a node has to do with a model."""

    node: str
    devices: frozenset[str]
    """Those on which its stages stood."""
    last_used_at: float
    """When a stage of it last stood there, in seconds; now, if one still does."""
    cached_share: float = 0.0
    """Share of the model's weights in the node's host cache, 0 to 1."""


class AffinityWeights(msgspec.Struct, frozen=True, kw_only=True):
    """Eq 13 leaves them open; these are ours."""

    recency: float = 1.0
    """w_t."""
    decay_per_s: float = 1 / 300
    """lambda: a use has faded to 1/e after five minutes, when elastic devices are given back."""
    device: float = 0.1
    """w_g, for each device that is available again."""
    cached: float = 1.0
    """For all of the model's weights in the host cache; beside Eq 13, which takes a recent use as a sign of it."""


def affinity(hosting: Hosting, *, at: float, available: Collection[str], weights: AffinityWeights) -> float:
    """Eq 13's term of one host, ``w_t exp(-lambda (t_now - t_s)) + w_g |g_s n G_avail|``, plus what its cache is worth.

    Args:
        at: now.
        available: devices that can take a stage (G_avail). A host without any has no affinity.
    """
    num_available = len(hosting.devices.intersection(available))
    if not num_available:
        return 0.0
    age = max(0.0, at - hosting.last_used_at)
    recency = weights.recency * math.exp(-weights.decay_per_s * age)
    return recency + weights.device * num_available + weights.cached * hosting.cached_share
