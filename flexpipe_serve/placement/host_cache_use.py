"""How much the host cache of a node holds. Imports no torch: the Router reads it too."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class HostCacheUse:
    """A node's cache, as one stage sees it."""

    used_bytes: int
    limit_bytes: int
    """As things stand: it follows the node's free memory."""
    num_parts: int
    """Layers and ends held, of this model in this form."""
    num_hits: int
    """Parts that this stage found there."""
    num_misses: int
    """Parts that this stage had to make from the checkpoint."""
