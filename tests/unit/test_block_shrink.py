"""Blocks above a shrunk limit: none handed out, contents moved down or evicted, and growth at any moment."""

from __future__ import annotations

import random

import pytest

from flexpipe_serve.errors import RefactorRefusedError
from flexpipe_serve.kv.block_manager import BlockManager
from flexpipe_serve.kv.int_vector import Int32Vector


def make_manager(num_blocks: int) -> BlockManager:
    """One token a block."""
    return BlockManager(num_blocks=num_blocks, block_size=1, prefix_cache=True)


def compute(manager: BlockManager, tokens: list[int]) -> Int32Vector:
    """The table of ``tokens``, all computed."""
    vector, table = Int32Vector(tokens), Int32Vector()
    cached = manager.find_room(vector, max_cached_tokens=len(tokens) - 1, num_reserved=0)
    assert cached is not None
    manager.acquire(cached, table)
    manager.allocate(len(tokens) - len(cached), table)
    manager.publish(table, vector, start=len(cached), stop=len(tokens))
    return table


def cached_blocks(manager: BlockManager, tokens: list[int]) -> list[int]:
    found = manager.find_room(Int32Vector(tokens), max_cached_tokens=len(tokens), num_reserved=-99)
    assert found is not None
    return found


def counts(manager: BlockManager) -> tuple[int, int, int, int]:
    return manager.num_blocks, manager.num_free, manager.num_cached, manager.num_used


def ids(table: Int32Vector) -> list[int]:
    values: list[int] = table.view().tolist()
    return values


def test_used_blocks_move_to_the_lowest_free_ones_in_small_batches() -> None:
    manager = make_manager(10)
    low, high = compute(manager, [1, 2, 3, 4]), compute(manager, [5, 6, 7])
    manager.release(low)  # blocks 0 to 3 are cached
    manager.shrink(5)
    assert counts(manager) == (5, 0, 2, 3)
    manager.check_integrity([high])
    first = manager.take_moves([high], max_moves=1)
    assert first == ((5, 2),)  # the oldest contents, of blocks 3 and 2, have gone
    assert ids(high) == [4, 2, 6]
    manager.check_integrity([high], first)
    second = manager.take_moves([high], max_moves=8)
    assert second == ((6, 3),)
    assert not manager.is_shrunk
    manager.finish_moves(first)
    assert not manager.is_shrunk
    manager.finish_moves(second)
    assert manager.is_shrunk
    assert manager.take_moves([high], max_moves=8) == ()
    manager.check_integrity([high])
    assert (cached_blocks(manager, [1, 2, 3]), cached_blocks(manager, [5, 6, 7])) == ([0, 1], [4, 2, 3])


def test_a_shared_block_moves_in_all_tables() -> None:
    manager = make_manager(8)
    gone = compute(manager, [0, 0, 0])
    first, second = compute(manager, [1, 2, 3]), compute(manager, [1, 2, 4])
    assert ids(first)[:2] == ids(second)[:2] == [3, 4]
    manager.release(gone)
    manager.shrink(4)
    moves = manager.take_moves([first, second], max_moves=8)
    assert dict(moves).keys() == {4, 5, 6}
    assert ids(first)[:2] == ids(second)[:2] == [3, dict(moves)[4]]
    manager.check_integrity([first, second], moves)
    manager.release(first)
    manager.check_integrity([second], moves)


def test_cached_blocks_move_while_there_is_room_and_keep_their_turn_to_be_evicted() -> None:
    manager = make_manager(8)
    tables = [compute(manager, [token]) for token in (10, 11, 12, 13, 14, 15)]
    for index in (5, 0, 4, 1, 3, 2):  # oldest to newest
        manager.release(tables[index])
    manager.shrink(4)
    assert counts(manager) == (4, 0, 4, 0)
    moves = manager.take_moves([], max_moves=8)
    assert [t for t in range(10, 16) if not cached_blocks(manager, [t])] == [10, 15]  # the two oldest
    assert moves == ((4, 0),)  # block 5 had the oldest, block 0 the next
    manager.finish_moves(moves)
    manager.check_integrity([])
    evicted = []
    for token in (20, 21, 22, 23):
        alive = {t for t in range(10, 16) if cached_blocks(manager, [t])}
        compute(manager, [token])
        evicted += [t for t in alive if not cached_blocks(manager, [t])]
    assert evicted == [14, 11, 13, 12]


def test_what_is_allocated_in_a_shrink_leaves_every_high_block_a_place() -> None:
    manager = make_manager(9)
    low, high = compute(manager, [1, 2, 3, 4]), compute(manager, [5, 6, 7, 8])
    manager.release(low)
    manager.shrink(6)
    assert manager.num_available == 2
    assert manager.find_room(Int32Vector([9, 9, 9]), max_cached_tokens=0, num_reserved=0) is None
    new = compute(manager, [20, 21])
    assert max(ids(new)) < 6
    assert counts(manager) == (6, 0, 0, 6)
    manager.check_integrity([high, new])
    moves = manager.take_moves([high, new], max_moves=8)
    assert {source for source, _ in moves} == {6, 7}
    manager.finish_moves(moves)
    manager.check_integrity([high, new])


def test_much_that_no_longer_fits_goes_little_by_little() -> None:
    manager = make_manager(1000)
    tables = [compute(manager, [token]) for token in range(1000)]
    random.Random(0).shuffle(tables)
    for table in tables:
        manager.release(table)
    manager.shrink(600)
    num_in_use = [1000]
    while not manager.is_shrunk:
        assert counts(manager) == (600, 0, 600, 0)
        moves = manager.take_moves([], max_moves=3)
        assert 1 <= len(moves) <= 3
        manager.check_integrity([], moves)
        manager.finish_moves(moves)
        num_in_use.append(len(manager.in_use()))
    assert num_in_use[:8] == [1000, 936, 872, 808, 744, 680, 616, 600]
    assert num_in_use[-1] == 600


def test_a_batch_moves_something_though_much_has_to_go_first() -> None:
    manager = make_manager(1000)
    low, high, highest = compute(manager, list(range(600))), compute(manager, list(range(600, 999))), Int32Vector()
    manager.release(high)
    manager.release(low)
    manager.allocate(1, highest)
    manager.shrink(600)
    assert manager.take_moves([highest], max_moves=8) == ((999, 599),)
    manager.check_integrity([highest], ((999, 599),))


def test_a_high_block_given_back_is_not_handed_out_and_need_not_move() -> None:
    manager = BlockManager(num_blocks=6, block_size=1, prefix_cache=False)
    low, high = Int32Vector(), Int32Vector()
    manager.allocate(3, low)
    manager.allocate(3, high)
    manager.release(low)
    manager.shrink(3)
    manager.release(high)
    assert manager.is_shrunk
    assert counts(manager) == (3, 3, 0, 0)
    manager.check_integrity([])


def test_a_shrink_below_what_is_used_is_refused_before_anything_changes() -> None:
    manager = make_manager(8)
    cached, table = compute(manager, [1, 2]), compute(manager, [3, 4, 5])
    manager.release(cached)
    before = counts(manager)
    with pytest.raises(RefactorRefusedError, match="shrink to 2 blocks: 3 are in use"):
        manager.shrink(2)
    assert counts(manager) == before
    assert manager.is_shrunk
    manager.check_integrity([table])
    manager.shrink(3)


def test_growth_takes_a_shrink_back_wherever_it_stands() -> None:
    manager = make_manager(8)
    low, high = compute(manager, [1, 2, 3]), compute(manager, [5, 6, 7])
    manager.release(low)
    manager.shrink(3)
    moves = manager.take_moves([high], max_moves=1)
    assert moves == ((3, 0),)
    manager.grow(8)
    manager.check_integrity([high], moves)
    assert ids(high) == [0, 4, 5]
    # Block 3 is copied from by a step in flight: it is not to be had before that is over.
    assert counts(manager) == (8, 4, 0, 3)
    other = compute(manager, [20, 21, 22, 23])
    assert sorted(ids(other)) == [1, 2, 6, 7]
    assert manager.num_available == 0
    manager.finish_moves(moves)
    assert manager.num_available == 1
    assert manager.is_shrunk
    manager.check_integrity([high, other])


def test_growth_part_of_the_way_and_a_shrink_further_down() -> None:
    manager = make_manager(12)
    low, high = compute(manager, list(range(1, 7))), compute(manager, list(range(11, 15)))
    manager.release(low)
    manager.shrink(8)
    manager.grow(9)
    manager.check_integrity([high])
    assert counts(manager)[0] == 9
    first = manager.take_moves([high], max_moves=9)
    assert [source for source, _ in first] == [9]
    manager.shrink(5)
    manager.check_integrity([high], first)
    second = manager.take_moves([high], max_moves=9)
    manager.finish_moves(first)
    manager.finish_moves(second)
    assert manager.is_shrunk
    assert max(ids(high)) < 5
    manager.grow(20)
    manager.check_integrity([high])
    assert manager.num_available == 16


def test_withheld_blocks_count_when_the_next_shrink_is_judged() -> None:
    manager = make_manager(4)
    low, high = compute(manager, [1]), compute(manager, [2, 3])
    manager.release(low)
    manager.shrink(2)
    moves = manager.take_moves([high], max_moves=8)
    assert moves == ((2, 0),)
    manager.grow(4)
    assert manager.num_used == 2
    manager.allocate(1, low)
    assert ids(low) == [3]
    with pytest.raises(RefactorRefusedError, match="shrink to 3 blocks: 4 are in use"):
        manager.shrink(3)  # below it are 0 and 1, and 2, which is withheld: there is no place for 3
    manager.finish_moves(moves)
    manager.shrink(3)
    assert manager.take_moves([high, low], max_moves=8) == ((3, 2),)


def test_reset_forgets_a_shrink() -> None:
    manager = make_manager(6)
    low, high = compute(manager, [1, 2, 3]), compute(manager, [4, 5, 6])
    manager.release(low)
    manager.shrink(4)
    manager.take_moves([high], max_moves=1)
    manager.reset(5)
    assert manager.is_shrunk
    assert counts(manager) == (5, 5, 0, 0)
    manager.check_integrity([])


def test_blocks_in_use_are_the_used_and_the_cached_ones() -> None:
    manager = make_manager(9)
    cached, used, free = compute(manager, [1, 2]), compute(manager, [3, 4]), Int32Vector()
    manager.allocate(2, free)
    manager.release(cached)
    manager.release(free)
    found = manager.in_use()
    assert (found.tolist(), found.dtype) == ([0, 1, 2, 3], "int32")
    manager.shrink(3)
    assert manager.take_moves([used], max_moves=8) == ((3, 1),)
    assert manager.in_use().tolist() == [0, 1, 2]
    manager.release(used)
    assert manager.in_use().tolist() == [0, 1, 2]


def test_check_integrity_sees_lost_moves() -> None:
    manager = make_manager(6)
    low, high = compute(manager, [1, 2, 3]), compute(manager, [4, 5, 6])
    manager.release(low)
    manager.shrink(4)
    stale = Int32Vector(ids(high))
    moves = manager.take_moves([high], max_moves=1)
    manager.check_integrity([high], moves)
    for tables, unfinished in (([high], ()), ([high], (*moves, (5, 1))), ([stale], moves)):
        with pytest.raises(AssertionError):
            manager.check_integrity(tables, unfinished)
