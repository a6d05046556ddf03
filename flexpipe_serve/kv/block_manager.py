"""Which sequence holds which KV block, and which blocks' contents can be shared.

Pure bookkeeping over block ids; the memory itself lives in the stages. A block is in exactly one of three states:
*free* (nothing worth keeping), *cached* (computed, nobody's, evicted last-recently-used first) or *used*
(reference count above zero).

The prefix cache is a tree: a cached block is found by (the prefix before it, its own tokens). A prefix is named by a
number that is given out once and never again, so two different prefixes cannot be taken for each other whatever
their hashes do: the dictionary compares the tokens. Nor does it depend on the id of the block that holds it.
"""

from __future__ import annotations

import heapq
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

from flexpipe_serve.kv.int_vector import Int32Vector

_ROOT = 0
"""The prefix of no tokens."""

_PrefixKey = tuple[int, tuple[int, ...]]


class BlockManager:
    """Hands out the blocks ``0 .. num_blocks - 1`` of ``block_size`` tokens each.

    A block table lists a sequence's blocks in token order; the caller owns it and passes it back to ``release``.
    Only full blocks whose KV is computed are shared, so a shared block is never written.

    Args:
        prefix_cache: False: nothing is ever shared, a released block is free at once.
    """

    def __init__(self, *, num_blocks: int, block_size: int, prefix_cache: bool) -> None:
        assert num_blocks > 0
        assert block_size > 0
        self.block_size = block_size
        self.prefix_cache = prefix_cache
        self.reset(num_blocks)

    def reset(self, num_blocks: int) -> None:
        """Start anew with ``num_blocks`` blocks. Every table and the whole prefix cache are void."""
        self.num_blocks = num_blocks
        self._num_references = [0] * num_blocks
        # A heap: low ids go first, so that high ids tend to be free.
        self._free = list(range(num_blocks))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._block_of: dict[_PrefixKey, int] = {}
        self._key_of: dict[int, _PrefixKey] = {}
        self._prefix_of: dict[int, int] = {}
        self._next_prefix = _ROOT + 1

    @property
    def num_free(self) -> int:
        """Blocks without content."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Blocks nobody uses whose content can still be found."""
        return len(self._cached)

    @property
    def num_used(self) -> int:
        """Blocks held by at least one table."""
        return self.num_blocks - self.num_available

    @property
    def num_available(self) -> int:
        """Blocks ``allocate`` can hand out: free and cached ones."""
        return len(self._free) + len(self._cached)

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that ``num_tokens`` tokens of one sequence take."""
        return -(-num_tokens // self.block_size)

    def find_room(self, tokens: Int32Vector, *, max_cached_tokens: int, num_reserved: int) -> list[int] | None:
        """Cached blocks of the longest known prefix of ``tokens``, if blocks for the other tokens are available.

        Changes nothing: call ``acquire`` with the result before anything else.

        Args:
            max_cached_tokens: at most so many tokens are taken from the prefix cache; full blocks only.
            num_reserved: available blocks to be left over.

        Returns:
            None where too few blocks are available.
        """
        cached = self._match(tokens, max_cached_tokens)
        num_idle = sum(1 for block in cached if self._num_references[block] == 0)
        num_missing = self.num_blocks_for(len(tokens)) - len(cached)
        return cached if num_missing + num_idle + num_reserved <= self.num_available else None

    def acquire(self, blocks: Sequence[int], table: Int32Vector) -> None:
        """Share computed ``blocks``: append them to ``table``."""
        for block in blocks:
            self._acquire_block(block)
        table.extend(blocks)

    def allocate(self, num: int, table: Int32Vector) -> None:
        """Append ``num`` (at most ``num_available``) blocks to write to; cached contents go, oldest first."""
        assert num <= self.num_available, f"{num} blocks wanted, {self.num_available} available"
        for _ in range(num):
            block = heapq.heappop(self._free) if self._free else self._evict()
            self._num_references[block] = 1
            table.append(block)

    def publish(self, table: Int32Vector, tokens: Int32Vector, *, start: int, stop: int) -> None:
        """Make the blocks that became full shareable: KV of tokens ``start`` to ``stop`` has just been computed.

        Every full block before ``start`` has been published already. Where another table published the same prefix
        meanwhile, ``table`` takes over that block and its own goes back: the cache holds each prefix once, and a
        block is never cached without those before it. No step in flight may use ``table``.
        """
        if not self.prefix_cache:
            return
        for index in range(start // self.block_size, stop // self.block_size):
            block = table[index]
            prefix = self._prefix_of[table[index - 1]] if index else _ROOT
            key = (prefix, self._tokens_at(tokens, index * self.block_size))
            known = self._block_of.get(key)
            if known is None:
                self._block_of[key] = block
                self._key_of[block] = key
                self._prefix_of[block] = self._next_prefix
                self._next_prefix += 1
            else:
                self._acquire_block(known)
                table[index] = known
                self._release_block(block)

    def release(self, table: Int32Vector) -> None:
        """Give up all blocks of ``table`` and empty it. No step in flight may use them."""
        # Last block first: it is then older than the blocks before it, so no prefix is evicted before its extension.
        for block in reversed(table.view().tolist()):
            self._release_block(block)
        table.clear()

    def check_integrity(self, tables: Iterable[Int32Vector]) -> None:
        """Raises AssertionError unless free, cached and used blocks are what ``tables``, all there are, imply."""
        num_references = Counter(block for table in tables for block in table.view().tolist())
        free, cached, used = set(self._free), set(self._cached), set(num_references)
        assert len(free) == len(self._free), "a block is free twice"
        assert len(free) + len(cached) + len(used) == self.num_blocks, "a block is lost or in two states"
        assert free | cached | used == set(range(self.num_blocks)), "a block is lost"
        assert self._num_references == [num_references[b] for b in range(self.num_blocks)], "wrong reference count"
        assert self._key_of.keys() == self._prefix_of.keys()
        assert {block: key for key, block in self._block_of.items()} == self._key_of
        assert cached <= self._key_of.keys() <= cached | used
        prefixes = {_ROOT, *self._prefix_of.values()}
        assert len(prefixes) == 1 + len(self._prefix_of), "two blocks have one prefix"
        assert all(prefix in prefixes for prefix, _ in self._block_of), "a block is cached without its prefix"

    def _tokens_at(self, tokens: Int32Vector, start: int) -> tuple[int, ...]:
        values: Sequence[int] = tokens.view(start, start + self.block_size).tolist()
        return tuple(values)

    def _match(self, tokens: Int32Vector, max_tokens: int) -> list[int]:
        blocks: list[int] = []
        prefix = _ROOT
        for start in range(0, max_tokens - self.block_size + 1, self.block_size):
            block = self._block_of.get((prefix, self._tokens_at(tokens, start)))
            if block is None:
                break
            blocks.append(block)
            prefix = self._prefix_of[block]
        return blocks

    def _acquire_block(self, block: int) -> None:
        if self._num_references[block] == 0:
            del self._cached[block]
        self._num_references[block] += 1

    def _release_block(self, block: int) -> None:
        self._num_references[block] -= 1
        if self._num_references[block] == 0:
            if block in self._key_of:
                self._cached[block] = None
            else:
                heapq.heappush(self._free, block)

    def _evict(self) -> int:
        block, _ = self._cached.popitem(last=False)
        del self._block_of[self._key_of.pop(block)]
        del self._prefix_of[block]
        return block
