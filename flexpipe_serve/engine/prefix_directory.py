"""Which pipeline has computed the beginning of a prompt: pure code.

It remembers who was given which prompt's blocks, not what a KV cache holds now: a pipeline may have dropped them. That
costs time and no more, and needs no answer of an engine thread.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Sequence

_MAX_BLOCKS = 64
"""Of a prompt that are looked at."""
_MAX_KNOWN = 16384
"""Blocks remembered of a pipeline; of more the ones longest unused are forgotten."""


class PrefixDirectory:
    """Beginnings of prompts by pipeline.

    Args:
        block_size: tokens that count together; a beginning is a whole number of them.
    """

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._known: defaultdict[int, OrderedDict[int, None]] = defaultdict(OrderedDict)

    def note(self, pipeline: int, token_ids: Sequence[int]) -> None:
        """A pipeline is given this prompt."""
        known = self._known[pipeline]
        # The last block first: a beginning is then forgotten after what goes on from it.
        for prefix in reversed(list(self._prefixes(token_ids))):
            known[prefix] = None
            known.move_to_end(prefix)
        while len(known) > _MAX_KNOWN:
            known.popitem(last=False)

    def num_cached_tokens(self, pipeline: int, token_ids: Sequence[int]) -> int:
        """Tokens at the beginning of a prompt that the pipeline had before."""
        known = self._known[pipeline]
        num_blocks = 0
        for prefix in self._prefixes(token_ids):
            if prefix not in known:
                break
            num_blocks += 1
        return num_blocks * self._block_size

    def forget(self, pipeline: int) -> None:
        """The pipeline's KV is gone."""
        self._known.pop(pipeline, None)

    def _prefixes(self, token_ids: Sequence[int]) -> Iterator[int]:
        """A number for each beginning of whole blocks, the shortest first."""
        size, prefix = self._block_size, 0
        for start in range(0, min(len(token_ids) // size, _MAX_BLOCKS) * size, size):
            prefix = hash((prefix, *token_ids[start : start + size]))
            yield prefix
