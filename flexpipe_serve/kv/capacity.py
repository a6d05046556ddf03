"""How many KV blocks fit: the minimum over domains of what their budgets leave (PipeLive's feasibility, P2-P3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flexpipe_serve.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class StageFootprint:
    """What one stage takes of its domain's budget before any KV."""

    stage: str
    domain: str
    num_layers: int
    weights_bytes: int
    overhead_bytes: int
    """The process itself: interpreter, libraries, work buffers."""


def max_blocks(*, footprints: Sequence[StageFootprint], budgets: Mapping[str, int], block_bytes: int) -> int:
    """Blocks that every domain can hold; block ids are the same on all stages, so the smallest domain decides.

    Args:
        budgets: bytes by domain.
        block_bytes: bytes of one block of one layer.

    Raises:
        ConfigError: a domain cannot hold a single block; with its numbers.
    """
    fewest: int | None = None
    for domain in sorted({f.domain for f in footprints}):
        members = [f for f in footprints if f.domain == domain]
        weights = sum(f.weights_bytes for f in members)
        overhead = sum(f.overhead_bytes for f in members)
        per_block = sum(f.num_layers for f in members) * block_bytes
        blocks = (budgets[domain] - weights - overhead) // per_block
        if blocks < 1:
            raise ConfigError(
                f"memory budget of domain {domain!r} is {budgets[domain] / 2**20:.0f} MiB, but its stages need"
                f" {weights / 2**20:.0f} MiB for weights, {overhead / 2**20:.0f} MiB for their processes and"
                f" {per_block / 2**20:.1f} MiB for each KV block. Raise memory_budget or lower kv.block_size."
            )
        fewest = blocks if fewest is None else min(fewest, blocks)
    assert fewest is not None
    return fewest
