"""Whole copies in random order of events: the target is the source at every step that it says it has reached."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kv_transfer_sim import run_history

from flexpipe_serve.errors import CopyError
from flexpipe_serve.kv import transfer, transfer_plan
from flexpipe_serve.kv.transfer import KVGiver, KVTaker


@settings(max_examples=150, deadline=None)
@given(rng=st.randoms(use_true_random=False))
def test_target_equals_source_at_every_step_it_reached(rng: random.Random) -> None:
    run_history(rng)


def test_histories_are_not_trivial() -> None:
    worlds = [run_history(random.Random(seed)) for seed in range(100)]
    assert sum(len(world.chunks_sent) for world in worlds) > 500
    assert sum(len(world.delivered) for world in worlds) > 1000
    assert sum(world.taker.patch_bytes for world in worlds) > 0
    assert any(not world.chunks_sent for world in worlds)  # the first patch already ended an empty snapshot


def _patch(owner: Any, name: str, change: Callable[..., Any]) -> Any:
    return patch.object(owner, name, change)


def _pending_for_ever(self: Any, places: Any, *, block_size: int) -> Any:
    return places[~np.isin(places // block_size, self._blocks)]


def _pending_until_complete(self: Any, places: Any, *, block_size: int) -> Any:
    return places if self.is_taken else places[:0]


def _chunk_of_first_layer_only(take: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def wrong(self: Any) -> Any:
        chunk = take(self)
        return type(chunk)(chunk.layers[:1], chunk.blocks)

    return wrong


def _no_patch_for_dropped(on_steps: Callable[..., Any]) -> Callable[..., Any]:
    def wrong(self: Any, steps: list[tuple[int, Any]]) -> Any:
        return on_steps(self, [(step + 1 if batch is None else step, batch) for step, batch in steps])

    return wrong


def _only_the_last(on_steps: Callable[..., Any]) -> Callable[..., Any]:
    def wrong(self: Any, steps: list[tuple[int, Any]]) -> Any:
        return on_steps(self, steps[-1:])

    return wrong


def _without_number(apply: Callable[..., bool]) -> Callable[..., bool]:
    def wrong(self: KVTaker, header: Any, buffers: Any) -> bool:
        self._last_number = header.number - 1
        self.through_step = 0
        return apply(self, header, buffers)

    return wrong


def _keys_only(places: Any, *, block_size: int) -> Any:
    keys = transfer_plan.rows_of_places(places, block_size=block_size)[::2]
    return np.repeat(keys, 2)


BUGS = {
    "a block stays pending after its chunk was read": _patch(
        transfer_plan.Snapshot, "without_pending", _pending_for_ever
    ),
    "nothing is mirrored before the snapshot is complete": _patch(
        transfer_plan.Snapshot, "without_pending", _pending_until_complete
    ),
    "a chunk leaves out layers": _patch(
        transfer_plan.Snapshot, "take", _chunk_of_first_layer_only(transfer_plan.Snapshot.take)
    ),
    "a begun block is not zeroed": _patch(transfer, "begun_blocks", lambda places, block_size: places[:0]),
    "a filled block is zeroed instead of a begun one": _patch(
        transfer, "begun_blocks", lambda places, block_size: np.unique(places // block_size)
    ),
    "values are not carried": _patch(transfer, "rows_of_places", _keys_only),
    "through_step runs ahead": _patch(KVGiver, "on_steps", _no_patch_for_dropped(KVGiver.on_steps)),
    "of several steps only the last is mirrored": _patch(KVGiver, "on_steps", _only_the_last(KVGiver.on_steps)),
    "repeated messages are applied again": _patch(KVTaker, "apply", _without_number(KVTaker.apply)),
    "acknowledgements are not waited for": _patch(
        transfer_plan.Pace, "ready_at", lambda self, now: max(now, self._not_before)
    ),
    "the limit of bytes a second is ignored": _patch(
        transfer_plan.Pace, "ready_at", lambda self, now: None if len(self._in_flight) >= 2 else now
    ),
}


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_is_found(bug: str) -> None:
    with BUGS[bug], pytest.raises((AssertionError, CopyError, KeyError)):
        _run_histories(300)


def _run_histories(num: int) -> None:
    for seed in range(num):
        run_history(random.Random(seed))
