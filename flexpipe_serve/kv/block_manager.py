"""Which sequence holds which KV block, and which blocks' contents can be shared.

Pure bookkeeping over block ids; the memory itself lives in the stages. A block is in one of three states:
*free* (nothing worth keeping), *cached* (computed, nobody's, evicted last-recently-used first) or *used*
(reference count above zero).

The prefix cache is a tree: a cached block is found by (the prefix before it, its own tokens). A prefix is named by a
number that is given out once and never again, so two different prefixes cannot be taken for each other whatever
their hashes do: the dictionary compares the tokens. Nor does it depend on the id of the block that holds it.

A shrink takes effect in the counts at once: no more is handed out than leaves every used *high* block (one with content
above the new limit) a place below it. So the moves, and the eviction of what no longer fits, are done little by little
between everything else, and never fail. Between a move and the end of the step that copies the contents, the block
moved from is *withheld*, also where it is below the limit again because the capacity has grown meanwhile.
"""

from __future__ import annotations

import heapq
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from flexpipe_serve.errors import RefactorRefusedError
from flexpipe_serve.kv.int_vector import Int32Vector

_ROOT = 0
"""The prefix of no tokens."""

_MAX_EVICTIONS = 64
"""Cached blocks that one batch of moves evicts to make room, where fewer would not do: about 0.1 ms."""

_PrefixKey = tuple[int, tuple[int, ...]]
Moves = tuple[tuple[int, int], ...]
"""Blocks whose contents move: (from, to)."""


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
        self._cached: OrderedDict[int, int] = OrderedDict()
        """Prefix -> block, so that a block keeps its turn when it moves."""
        self._block_of: dict[_PrefixKey, int] = {}
        self._key_of: dict[int, _PrefixKey] = {}
        self._prefix_of: dict[int, int] = {}
        self._next_prefix = _ROOT + 1
        self._high: OrderedDict[int, None] = OrderedDict()
        """Used and cached blocks above the limit, in the order in which they are to move."""
        self._withheld: set[int] = set()
        """Moved from by steps that are not over."""

    @property
    def num_free(self) -> int:
        """Blocks without content, but for those that high blocks move to."""
        return max(0, len(self._free) - len(self._high))

    @property
    def num_cached(self) -> int:
        """Blocks nobody uses whose content can be found, and still fits."""
        return self.num_available - self.num_free

    @property
    def num_used(self) -> int:
        """Blocks held by at least one table."""
        return self.num_blocks - self.num_available - self._num_withheld(self.num_blocks)

    @property
    def num_available(self) -> int:
        """Blocks ``allocate`` can hand out: free and cached ones."""
        return len(self._free) + len(self._cached) - len(self._high)

    @property
    def is_shrunk(self) -> bool:
        """True where every block with content is below ``num_blocks`` and no move is unfinished."""
        return not self._high and not self._withheld

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
            while not self._free:
                self._evict()
            block = heapq.heappop(self._free)
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

    def shrink(self, num_blocks: int) -> None:
        """Hand out no more than ``num_blocks`` blocks, and none but the first ones, from now on.

        What is above the limit is for ``take_moves``; cached contents that no longer fit go, oldest first.

        Raises:
            RefactorRefusedError: more blocks are used; nothing has changed.
        """
        assert 0 < num_blocks <= self.num_blocks
        num_needed = self.num_used + self._num_withheld(num_blocks)
        if num_needed > num_blocks:
            raise RefactorRefusedError(
                f"The KV cache cannot shrink to {num_blocks} blocks: {num_needed} are in use. "
                "Wait until requests have ended, or keep more blocks."
            )
        self.num_blocks = num_blocks
        self._free = sorted(block for block in self._free if block < num_blocks)
        used = (block for block in range(num_blocks, len(self._num_references)) if self._num_references[block])
        # Of the cached ones the newest first: the oldest may be evicted before their turn to move.
        cached = (block for block in reversed(self._cached.values()) if block >= num_blocks)
        self._high = OrderedDict.fromkeys((*used, *cached))

    def grow(self, num_blocks: int) -> None:
        """Hand out ``num_blocks`` blocks from now on; a shrink in progress is taken back so far."""
        assert num_blocks >= self.num_blocks
        self._num_references += [0] * (num_blocks - len(self._num_references))
        taken = self._withheld.union(self._high)
        # They are greater than all that are free, and rising: the list remains a heap.
        self._free += [block for block in range(self.num_blocks, num_blocks) if block not in taken]
        for block in [block for block in self._high if block < num_blocks]:
            del self._high[block]
        self.num_blocks = num_blocks

    def take_moves(self, tables: Iterable[Int32Vector], *, max_moves: int) -> Moves:
        """Move high blocks down: in the books and in ``tables``, all there are, it is done when this returns.

        The next step has to copy the contents before it computes anything; call ``finish_moves`` when it is over.
        Steps in flight may still write to the blocks moved from, if every stage executes them before that step.

        Returns:
            No moves only where no block is high any more.
        """
        if not self._high:
            return ()
        num_evictions = 0
        while len(self._free) < len(self._high) and (num_evictions < _MAX_EVICTIONS or not self._free):
            self._evict()
            num_evictions += 1
        moves: dict[int, int] = {}
        while self._high and self._free and len(moves) < max_moves:
            source, _ = self._high.popitem(last=False)
            moves[source] = heapq.heappop(self._free)
            self._rename(source, moves[source])
        if moves:
            new_ids = np.arange(len(self._num_references), dtype=np.int32)
            new_ids[list(moves.keys())] = list(moves.values())
            for table in tables:
                ids = table.view()
                ids[:] = new_ids[ids]
            self._withheld.update(moves)
        return tuple(moves.items())

    def finish_moves(self, moves: Moves) -> None:
        """The step with these copies is over: the blocks moved from have no content any more."""
        for source, _ in moves:
            self._withheld.remove(source)
            if source < self.num_blocks:
                heapq.heappush(self._free, source)

    def in_use(self) -> npt.NDArray[np.int32]:
        """Ids of the blocks with content, used and cached, rising. In a shrink also of what no longer fits."""
        has_content = np.array(self._num_references) > 0
        has_content[list(self._cached.values())] = True
        return np.flatnonzero(has_content).astype(np.int32)

    def check_integrity(self, tables: Iterable[Int32Vector], unfinished_moves: Moves = ()) -> None:
        """Raises AssertionError unless free, cached, used and withheld blocks are what ``tables`` and
        ``unfinished_moves``, all there are, imply."""
        num_references = Counter(block for table in tables for block in table.view().tolist())
        free, cached, used = set(self._free), set(self._cached.values()), set(num_references)
        states = (free, cached, used, self._withheld)
        below = set(range(self.num_blocks))
        assert sorted(self._withheld) == sorted(source for source, _ in unfinished_moves), "a move is lost"
        assert len(free) == len(self._free), "a block is free twice"
        assert len(cached) == len(self._cached), "a block is cached twice"
        assert sum(map(len, states)) == len(set().union(*states)), "a block is in two states"
        assert set().union(*states) >= below, "a block is lost"
        assert free <= below, "a block above the limit is free"
        assert set(self._high) == (cached | used) - below, "a block above the limit does not move"
        assert self.num_available >= 0, "a block has nowhere to move"
        assert self.num_used == len(used)
        assert self._num_references == [num_references[b] for b in range(len(self._num_references))], "wrong count"
        assert all(self._prefix_of[block] == prefix for prefix, block in self._cached.items())
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
            del self._cached[self._prefix_of[block]]
        self._num_references[block] += 1

    def _release_block(self, block: int) -> None:
        self._num_references[block] -= 1
        if self._num_references[block] == 0:
            prefix = self._prefix_of.get(block)
            if prefix is None:
                self._drop(block)
            else:
                self._cached[prefix] = block

    def _evict(self) -> None:
        """Drop the oldest cached content: a block more is free below the limit, or one fewer has to move there."""
        _, block = self._cached.popitem(last=False)
        del self._block_of[self._key_of.pop(block)]
        del self._prefix_of[block]
        self._drop(block)

    def _drop(self, block: int) -> None:
        if block < self.num_blocks:
            heapq.heappush(self._free, block)
        else:
            del self._high[block]

    def _rename(self, source: int, target: int) -> None:
        self._num_references[target] = self._num_references[source]
        self._num_references[source] = 0
        key = self._key_of.pop(source, None)
        if key is not None:
            prefix = self._prefix_of.pop(source)
            self._block_of[key], self._key_of[target], self._prefix_of[target] = target, key, prefix
            if prefix in self._cached:
                self._cached[prefix] = target

    def _num_withheld(self, num_blocks: int) -> int:
        return sum(1 for block in self._withheld if block < num_blocks)
