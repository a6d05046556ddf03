"""Block copies inside segments do what copying one after the other does."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexpipe_serve.kv.block_copies import copy_blocks, independent_runs

COPIES = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=20)


@given(COPIES)
def test_as_one_after_the_other(copies: list[tuple[int, int]]) -> None:
    segments = [torch.randn(10, 2, 3, 1, 4) for _ in range(2)]
    expected = [segment.clone() for segment in segments]
    for segment in expected:
        for source, target in copies:
            segment[target] = segment[source]
    copy_blocks(segments, copies)
    assert all(torch.equal(a, b) for a, b in zip(segments, expected, strict=True))
    assert [pair for run in independent_runs(copies) for pair in run] == copies


def test_a_move_down_is_a_single_run() -> None:
    assert len(list(independent_runs([(block + 100, block) for block in range(50)]))) == 1


@pytest.mark.parametrize("copies", [[(1, 2), (10, 0)], [(1, 2), (0, -1)]])
def test_blocks_that_are_not_there_copy_nothing(copies: list[tuple[int, int]]) -> None:
    segment = torch.randn(10, 2, 3, 1, 4)
    before = segment.clone()
    with pytest.raises(ValueError, match="the segment has 10 blocks"):
        copy_blocks([segment], copies)
    assert torch.equal(segment, before)
