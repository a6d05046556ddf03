"""What a stage's process is said to take."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from flexpipe_serve.pipeline.memory import Overhead


def test_buffers_that_steps_left_behind_are_not_counted_twice() -> None:
    """A server that had served refused what it could do when it was new."""
    overhead = Overhead(40)
    new = overhead.bytes(300, weights_bytes=100)
    assert new == 240
    assert overhead.bytes(325, weights_bytes=110) == new
    assert overhead.bytes(400, weights_bytes=100) == 300, "more than was estimated"


def test_an_empty_process_says_nothing_of_one_that_holds_weights() -> None:
    overhead = Overhead(40)
    assert overhead.bytes(150, weights_bytes=0) == 190
    assert overhead.bytes(300, weights_bytes=100) == 240


@given(st.integers(0, 100), st.lists(st.tuples(st.integers(0, 1000), st.integers(0, 1000))))
def test_it_is_never_less_than_there_is(work: int, seen: list[tuple[int, int]]) -> None:
    overhead = Overhead(work)
    for private, weights in seen:
        assert overhead.bytes(private, weights_bytes=weights) >= private - weights
