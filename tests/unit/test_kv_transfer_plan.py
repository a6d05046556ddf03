"""Order and pace of a snapshot, and which places a step writes."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from kv_transfer_sim import step_batch

from flexpipe_serve.kv.transfer_plan import (
    MAX_CHUNK_BYTES,
    MAX_CHUNKS_IN_FLIGHT,
    Pace,
    Snapshot,
    begun_blocks,
    places_of_new_tokens,
    rows_of_places,
)


@given(
    blocks=st.lists(st.integers(0, 99), max_size=60),
    num_layers=st.integers(1, 40),
    block_bytes=st.sampled_from([24 * 1024, 100_000, 400_000, 2_000_000]),
)
def test_every_block_of_every_layer_is_taken_once(blocks: list[int], num_layers: int, block_bytes: int) -> None:
    layers = tuple(range(5, 5 + num_layers))
    snapshot = Snapshot(np.array(blocks, np.int32), num_blocks=100, layers=layers, block_bytes=block_bytes)
    taken: list[tuple[int, int]] = []
    while not snapshot.is_taken:
        pending = set(range(100)) - set(snapshot.without_pending(np.arange(100), block_size=1).tolist())
        assert pending == set(blocks) - {block for _, block in taken}
        chunk = snapshot.take()
        assert chunk.blocks.size
        assert chunk.layers
        num_bytes = chunk.blocks.size * len(chunk.layers) * block_bytes
        assert num_bytes <= max(MAX_CHUNK_BYTES, block_bytes)
        taken += [(layer, block) for layer in chunk.layers for block in chunk.blocks.tolist()]
    assert sorted(taken) == sorted((layer, block) for layer in layers for block in set(blocks))


def test_demo_model_chunks_are_of_the_size_aimed_at() -> None:
    """10 layers of 16 tokens with 3 heads of 64 in float32: 24 KiB a block."""
    snapshot = Snapshot(np.arange(9, dtype=np.int32), num_blocks=9, layers=tuple(range(10)), block_bytes=24 * 1024)
    assert [snapshot.take().blocks.tolist() for _ in range(9)] == [[block] for block in range(9)]
    assert snapshot.is_taken


@given(
    rate=st.floats(1e3, 1e9),
    messages=st.lists(st.tuples(st.integers(0, 10**6), st.floats(0, 10.0)), min_size=1, max_size=30),
)
def test_pace_never_exceeds_the_limit(rate: float, messages: list[tuple[int, float]]) -> None:
    pace = Pace(max_bytes_per_s=rate)
    sent: list[tuple[float, int]] = []
    now = 0.0
    for number, (num_bytes, idle) in enumerate(messages, start=1):
        now += idle
        ready_at = pace.ready_at(now)
        assert ready_at is not None
        assert ready_at >= now
        now = ready_at
        pace.on_sent(number, num_bytes=num_bytes, now=now)
        sent.append((now, num_bytes))
        pace.on_ack(number)
    for i, (start, _) in enumerate(sent):
        num_bytes = 0
        for (_, this), (then, _) in zip(sent[i:], sent[i + 1 :], strict=False):
            num_bytes += this
            assert num_bytes <= rate * (then - start) * (1 + 1e-9) + 1e-3


def test_pace_waits_for_acknowledgements() -> None:
    pace = Pace(max_bytes_per_s=float("inf"))
    for number in range(1, MAX_CHUNKS_IN_FLIGHT + 1):
        assert pace.ready_at(5.0) == 5.0
        pace.on_sent(2 * number, num_bytes=1000, now=5.0)
    assert pace.ready_at(9.0) is None
    pace.on_ack(1)  # a patch before the first of them
    assert pace.ready_at(9.0) is None
    pace.on_ack(3)
    assert pace.ready_at(9.0) == 9.0


@given(
    block_size=st.sampled_from([1, 3, 16]),
    seqs=st.lists(st.tuples(st.integers(0, 50), st.integers(1, 40)), max_size=5),
    seed=st.integers(0, 99),
)
def test_places_of_new_tokens(block_size: int, seqs: list[tuple[int, int]], seed: int) -> None:
    free = np.random.default_rng(seed).permutation(1000).tolist()
    tables = [[free.pop() for _ in range(-(-(done + new) // block_size))] for done, new in seqs]
    batch = step_batch(1, num_computed=[d for d, _ in seqs], num_new=[n for _, n in seqs], tables=tables)
    places = places_of_new_tokens(batch.num_computed, batch.num_new, batch.block_tables, block_size=block_size)
    expected = [
        table[position // block_size] * block_size + position % block_size
        for (done, new), table in zip(seqs, tables, strict=True)
        for position in range(done, done + new)
    ]
    assert places.tolist() == expected
    written = set(expected)
    assert set(begun_blocks(places, block_size=block_size).tolist()) == {
        block
        for table in tables
        for block in table
        if block * block_size in written and any(block * block_size + o not in written for o in range(block_size))
    }


def test_a_place_is_a_key_row_and_a_value_row() -> None:
    segment = np.arange(3 * 2 * 4).reshape(3, 2, 4)  # [num_blocks, 2, block_size]
    rows = rows_of_places(np.array([0, 5, 11]), block_size=4)
    assert segment.ravel()[rows].tolist() == [*segment[0, :, 0], *segment[1, :, 1], *segment[2, :, 3]]
