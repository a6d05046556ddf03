"""Blocks: prefix sharing by content, LRU eviction, and no block lost or in two hands."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from flexpipe_serve.errors import RefactorRefusedError
from flexpipe_serve.kv.block_manager import BlockManager, Moves
from flexpipe_serve.kv.int_vector import Int32Vector


def compute(manager: BlockManager, tokens: list[int]) -> tuple[Int32Vector, Int32Vector, int]:
    """Admit ``tokens`` and compute them all: (tokens, table, number found in the cache)."""
    vector, table = Int32Vector(tokens), Int32Vector()
    cached = manager.find_room(vector, max_cached_tokens=len(tokens) - 1, num_reserved=0)
    assert cached is not None
    manager.acquire(cached, table)
    manager.allocate(manager.num_blocks_for(len(tokens)) - len(cached), table)
    manager.publish(table, vector, start=len(cached) * manager.block_size, stop=len(tokens))
    return vector, table, len(cached) * manager.block_size


def counts(manager: BlockManager) -> tuple[int, int, int]:
    return manager.num_free, manager.num_cached, manager.num_used


def test_low_ids_are_handed_out_first_also_after_a_release() -> None:
    manager = BlockManager(num_blocks=6, block_size=2, prefix_cache=False)
    first, second, third = Int32Vector(), Int32Vector(), Int32Vector()
    manager.allocate(3, first)
    manager.allocate(2, second)
    manager.release(first)
    manager.allocate(4, third)
    assert second.view().tolist() == [3, 4]
    assert third.view().tolist() == [0, 1, 2, 5]
    assert counts(manager) == (0, 0, 6)


def test_only_full_blocks_are_shared_and_never_the_last_token() -> None:
    manager = BlockManager(num_blocks=8, block_size=2, prefix_cache=True)
    _, table, num_cached = compute(manager, [1, 2, 3, 4, 5])
    assert num_cached == 0
    _, same, num_cached = compute(manager, [1, 2, 3, 4])
    assert num_cached == 2
    # Its second block had to be computed, but is the same as the one known: the table shares it all the same.
    assert same.view().tolist() == table.view(0, 2).tolist()
    _, longer, num_cached = compute(manager, [1, 2, 3, 4, 5, 6])
    assert num_cached == 4
    assert longer[0] == table[0]
    assert longer[2] != table[2]
    manager.check_integrity([table, same, longer])
    assert counts(manager) == (4, 0, 4)


def test_the_same_block_after_another_prefix_is_another_block() -> None:
    manager = BlockManager(num_blocks=8, block_size=2, prefix_cache=True)
    compute(manager, [1, 2, 7, 7, 0])
    assert compute(manager, [3, 4, 7, 7, 0])[2] == 0
    assert compute(manager, [3, 4, 7, 7, 1])[2] == 4


def test_colliding_hashes_are_told_apart() -> None:
    # CPython: hash(-1) == hash(-2), so the keys of these two prefixes collide.
    assert hash((0, (-1, -1))) == hash((0, (-2, -2)))
    manager = BlockManager(num_blocks=8, block_size=2, prefix_cache=True)
    _, first, _ = compute(manager, [-1, -1, 5])
    _, second, num_cached = compute(manager, [-2, -2, 5])
    assert num_cached == 0
    assert first[0] != second[0]


def test_a_prefix_evicted_and_computed_again_does_not_revive_what_followed_another_one() -> None:
    manager = BlockManager(num_blocks=4, block_size=1, prefix_cache=True)
    _, table, _ = compute(manager, [1, 2, 3, 4])
    manager.release(table)
    _, table, _ = compute(manager, [9, 2, 3, 4])
    manager.release(table)
    assert compute(manager, [1, 2])[2] == 0


def test_no_sharing_before_the_kv_is_computed() -> None:
    manager = BlockManager(num_blocks=8, block_size=2, prefix_cache=True)
    tokens, table = Int32Vector([1, 2, 3, 4, 5]), Int32Vector()
    manager.allocate(3, table)
    assert manager.find_room(tokens, max_cached_tokens=4, num_reserved=0) == []
    manager.publish(table, tokens, start=0, stop=3)
    assert manager.find_room(tokens, max_cached_tokens=4, num_reserved=0) == [table[0]]
    manager.publish(table, tokens, start=3, stop=5)
    assert manager.find_room(tokens, max_cached_tokens=4, num_reserved=0) == [table[0], table[1]]


def test_least_recently_used_goes_first_and_a_tail_before_its_prefix() -> None:
    manager = BlockManager(num_blocks=4, block_size=1, prefix_cache=True)
    _, old, _ = compute(manager, [1, 2])
    _, new, _ = compute(manager, [5, 6])
    manager.release(old)
    manager.release(new)
    _, old, num_cached = compute(manager, [1, 2])
    assert num_cached == 1
    manager.release(old)
    # Now, oldest first: 6, 5, 2, 1.
    order = []
    for token in (11, 12, 13, 14):
        alive = [p for p in ([1], [1, 2], [5], [5, 6]) if len(_cached(manager, p)) == len(p)]
        order.append(alive)
        compute(manager, [token])
    assert order == [[[1], [1, 2], [5], [5, 6]], [[1], [1, 2], [5]], [[1], [1, 2]], [[1]]]


def _cached(manager: BlockManager, tokens: list[int]) -> list[int]:
    found = manager.find_room(Int32Vector(tokens), max_cached_tokens=len(tokens), num_reserved=-manager.num_blocks)
    assert found is not None
    return found


def test_computing_the_same_prefix_twice_keeps_it_once() -> None:
    manager = BlockManager(num_blocks=8, block_size=2, prefix_cache=True)
    tokens = Int32Vector([1, 2, 3, 4, 5])
    first, second = Int32Vector(), Int32Vector()
    manager.allocate(3, first)
    manager.allocate(3, second)
    manager.publish(first, tokens, start=0, stop=5)
    manager.publish(second, tokens, start=0, stop=5)
    assert second.view(0, 2).tolist() == first.view(0, 2).tolist()
    assert second[2] != first[2]
    assert counts(manager) == (4, 0, 4)
    manager.release(first)
    manager.check_integrity([second])
    assert counts(manager) == (5, 0, 3)


def test_room_counts_idle_cached_blocks_once() -> None:
    manager = BlockManager(num_blocks=3, block_size=1, prefix_cache=True)
    tokens, table, _ = compute(manager, [1, 2, 3])
    manager.release(table)
    assert counts(manager) == (0, 3, 0)
    # Two found and one to be made: all three blocks, so none can be left over.
    assert manager.find_room(tokens, max_cached_tokens=2, num_reserved=0) is not None
    assert manager.find_room(tokens, max_cached_tokens=2, num_reserved=1) is None


def test_without_prefix_cache_nothing_is_kept() -> None:
    manager = BlockManager(num_blocks=4, block_size=1, prefix_cache=False)
    _, table, _ = compute(manager, [1, 2, 3])
    manager.release(table)
    assert counts(manager) == (4, 0, 0)
    assert compute(manager, [1, 2, 3])[2] == 0


def test_reset_drops_everything_and_changes_the_size() -> None:
    manager = BlockManager(num_blocks=4, block_size=1, prefix_cache=True)
    _, table, _ = compute(manager, [1, 2, 3])
    table.clear()
    manager.reset(6)
    manager.check_integrity([])
    assert counts(manager) == (6, 0, 0)
    assert compute(manager, [1, 2, 3])[2] == 0


def test_check_integrity_sees_lost_and_doubly_held_blocks() -> None:
    manager = BlockManager(num_blocks=4, block_size=1, prefix_cache=True)
    _, table, _ = compute(manager, [1, 2])
    with pytest.raises(AssertionError):
        manager.check_integrity([])
    with pytest.raises(AssertionError):
        manager.check_integrity([table, table])
    manager.check_integrity([table])


def test_a_vector_grows_and_keeps_its_elements() -> None:
    vector = Int32Vector([1, 2])
    for value in range(100):
        vector.append(value)
    vector.extend(list(range(500)))
    vector[0] = 7
    assert vector.view().tolist() == [7, 2, *range(100), *range(500)]
    assert (len(vector), vector[-1], vector.view(1, 3).tolist()) == (602, 499, [2, 0])
    with pytest.raises(IndexError):
        vector[602]
    vector.clear()
    assert len(vector) == 0


class BlockManagerHistories(RuleBasedStateMachine):
    """Random tables; the truth is which tokens each block was last written with."""

    @initialize(num_blocks=st.integers(1, 12), block_size=st.integers(1, 3))
    def start(self, num_blocks: int, block_size: int) -> None:
        self.manager = BlockManager(num_blocks=num_blocks, block_size=block_size, prefix_cache=True)
        self.live: list[tuple[Int32Vector, Int32Vector]] = []
        self.prefix_in: dict[int, list[int]] = {}
        """Block -> all tokens up to its end."""
        self.unfinished: list[Moves] = []

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=10), num_reserved=st.integers(0, 2))
    def admit(self, tokens: list[int], num_reserved: int) -> None:
        manager, size = self.manager, self.manager.block_size
        vector, table = Int32Vector(tokens), Int32Vector()
        before = manager.num_available
        cached = manager.find_room(vector, max_cached_tokens=len(tokens) - 1, num_reserved=num_reserved)
        if cached is None:
            assert manager.num_blocks_for(len(tokens)) + num_reserved > before
            return
        manager.acquire(cached, table)
        manager.allocate(manager.num_blocks_for(len(tokens)) - len(cached), table)
        assert manager.num_available >= num_reserved
        for index in range(len(cached)):
            assert self.prefix_in[table[index]] == tokens[: (index + 1) * size]
        held = {block for _, other in self.live for block in other.view().tolist()}
        for index in range(len(cached), len(table)):
            assert table[index] not in held
            assert table[index] < manager.num_blocks
            assert table[index] not in self.moved_from()
            self.prefix_in[table[index]] = tokens[: (index + 1) * size]
        manager.publish(table, vector, start=len(cached) * size, stop=len(tokens))
        self.live.append((vector, table))

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        _, table = self.live.pop(data.draw(st.integers(0, len(self.live) - 1)))
        self.manager.release(table)

    @rule(surplus=st.integers(-2, 6))
    def shrink(self, surplus: int) -> None:
        manager = self.manager
        before = self.state()
        num_blocks = min(max(1, manager.num_used + surplus), manager.num_blocks)
        num_withheld = sum(1 for block in self.moved_from() if block < num_blocks)
        if manager.num_used + num_withheld > num_blocks:
            with pytest.raises(RefactorRefusedError):
                manager.shrink(num_blocks)
            assert self.state() == before
        else:
            manager.shrink(num_blocks)
            assert (manager.num_blocks, manager.num_used) == (num_blocks, before[3])

    @rule(max_moves=st.integers(1, 3))
    def take_moves(self, max_moves: int) -> None:
        moves = self.manager.take_moves([table for _, table in self.live], max_moves=max_moves)
        assert len(moves) <= max_moves
        assert moves or not set(self.manager.in_use()) - set(range(self.manager.num_blocks))
        self.unfinished.append(moves)
        for source, target in moves:
            assert source >= self.manager.num_blocks > target
            self.prefix_in[target] = self.prefix_in.pop(source)

    @precondition(lambda self: self.unfinished)
    @rule(data=st.data())
    def finish_moves(self, data: st.DataObject) -> None:
        self.manager.finish_moves(self.unfinished.pop(data.draw(st.integers(0, len(self.unfinished) - 1))))

    @rule(num_more=st.integers(0, 8))
    def grow(self, num_more: int) -> None:
        before = self.state()
        self.manager.grow(self.manager.num_blocks + num_more)
        assert self.state()[3:] == before[3:]

    def state(self) -> tuple[int, int, int, int, list[int]]:
        manager = self.manager
        return manager.num_blocks, manager.num_free, manager.num_cached, manager.num_used, manager.in_use().tolist()

    def moved_from(self) -> set[int]:
        return {source for moves in self.unfinished for source, _ in moves}

    @invariant()
    def integrity(self) -> None:
        if not hasattr(self, "manager"):
            return
        unfinished = tuple(move for moves in self.unfinished for move in moves)
        self.manager.check_integrity((table for _, table in self.live), unfinished)
        if self.manager.is_shrunk:
            in_use = self.manager.in_use().tolist()
            assert len(in_use) == self.manager.num_used + self.manager.num_cached
            assert all(block < self.manager.num_blocks for block in in_use)
        for tokens, table in self.live:
            for index in range(len(table)):
                expected = tokens.view().tolist()[: (index + 1) * self.manager.block_size]
                assert self.prefix_in[table[index]] == expected


BlockManagerHistories.TestCase.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
TestBlockManagerHistories = BlockManagerHistories.TestCase
