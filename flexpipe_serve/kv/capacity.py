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
    """KV segments that it maps and no other stage of the domain is counted for: stages share them."""
    weights_bytes: int
    overhead_bytes: int
    """The process itself: interpreter, libraries, work buffers."""


def blocks_by_domain(
    *, footprints: Sequence[StageFootprint], budgets: Mapping[str, int], block_bytes: int
) -> dict[str, int]:
    """Blocks that each domain's budget leaves room for; below 1 where it does not suffice. Domains without KV are left
    out. Arguments as for :func:`max_blocks`."""
    blocks = {}
    for domain in sorted({f.domain for f in footprints}):
        members = [f for f in footprints if f.domain == domain]
        per_block = sum(f.num_layers for f in members) * block_bytes
        if per_block:
            taken = sum(f.weights_bytes + f.overhead_bytes for f in members)
            blocks[domain] = (budgets[domain] - taken) // per_block
    return blocks


def max_blocks(*, footprints: Sequence[StageFootprint], budgets: Mapping[str, int], block_bytes: int) -> int:
    """Blocks that every domain can hold; block ids are the same on all stages, so the smallest domain decides.

    Args:
        footprints: at least one with layers.
        budgets: bytes by domain.
        block_bytes: bytes of one block of one layer.

    Raises:
        ConfigError: a domain cannot hold a single block; with its numbers.
    """
    blocks = blocks_by_domain(footprints=footprints, budgets=budgets, block_bytes=block_bytes)
    domain = min(blocks, key=lambda d: blocks[d])
    if blocks[domain] < 1:
        members = [f for f in footprints if f.domain == domain]
        raise ConfigError(
            f"memory budget of domain {domain!r} is {budgets[domain] / 2**20:.0f} MiB, but its stages need"
            f" {sum(f.weights_bytes for f in members) / 2**20:.0f} MiB for weights,"
            f" {sum(f.overhead_bytes for f in members) / 2**20:.0f} MiB for their processes and"
            f" {sum(f.num_layers for f in members) * block_bytes / 2**20:.1f} MiB for each KV block. Raise"
            " memory_budget or lower kv.block_size."
        )
    return blocks[domain]
