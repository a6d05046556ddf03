"""Which gap belongs to which window, and what follows: on times with known answers."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexpipe_serve.bench.memory import peak_extra_bytes
from flexpipe_serve.bench.tour import Step
from flexpipe_serve.bench.trial import Trial, assess, extra_memory, refactoring_window
from flexpipe_serve.bench.windows import TokenTimes, Window, expected_tokens
from flexpipe_serve.refactor.record import Mode, Outcome, Phase, RefactorPlan, RefactorRecord

times_of_streams = st.lists(st.lists(st.floats(0, 100), max_size=12).map(sorted), min_size=1, max_size=4)
edges = st.lists(st.floats(-5, 105), min_size=2, max_size=6, unique=True).map(sorted)


def record(**more: object) -> RefactorRecord:
    plan = RefactorPlan(
        verdict="fits", reason="", old=(), new=(), moves=(), launched=(), retired=(), domains=(), num_blocks_before=1,
        num_blocks_during=1, num_blocks_after=1, weights_bytes=0, kv_bytes=0,
    )  # fmt: skip
    fields: dict = {
        "id": "r", "mode": Mode.LIVE, "reason": "", "outcome": Outcome.DONE, "phase": Phase.RETIRE, "plan": plan,
        "epoch": 2, "requested_at": 1000.0, "seconds": 2.0,
    }  # fmt: skip
    return RefactorRecord(**(fields | more))


def trial(window: Window, *, before: Window, after: Window, **more: object) -> Trial:
    return Trial("shared", "live", 0, Step("shift", (1,), (2,)), record(**more), window, window.start_s, before, after)


def test_gaps_by_hand() -> None:
    times = TokenTimes([[1.0, 2.0, 3.0, 10.0], [2.5]])
    window = Window(1.5, 3.5)
    assert times.gaps_within(window) == pytest.approx([1.0])
    # The one that began before, and the long one that ends long after: both are the refactoring's.
    assert sorted(times.gaps_touching(window)) == pytest.approx([1.0, 1.0, 7.0])
    assert times.count(window) == 3
    assert times.rate([window]) == pytest.approx(1.5)
    assert times.rate([]) == 0


@given(times_of_streams, edges)
def test_every_gap_is_charged_to_somebody(streams: list[list[float]], cuts: list[float]) -> None:
    """Windows that lie side by side: each gap within one is touched by it, and what touches none lies outside."""
    times = TokenTimes(streams)
    windows = [Window(a, b) for a, b in itertools.pairwise(cuts)]
    for window in windows:
        assert set(times.gaps_within(window)) <= set(times.gaps_touching(window))
    gaps = [(a, b) for stream in streams for a, b in itertools.pairwise(stream)]
    whole = Window(cuts[0], cuts[-1])
    assert len(times.gaps_touching(whole)) == sum(b >= whole.start_s and a <= whole.end_s for a, b in gaps)
    num_touched = sum(len(times.gaps_touching(window)) for window in windows)
    assert num_touched >= len(times.gaps_touching(whole))


@given(times_of_streams, edges)
def test_tokens_are_counted_once(streams: list[list[float]], cuts: list[float]) -> None:
    times = TokenTimes(streams)
    parts = [times.count(Window(a, b)) for a, b in itertools.pairwise(cuts)]
    assert sum(parts) == times.count(Window(cuts[0], cuts[-1]))
    assert times.count(Window(-1, 101)) == sum(map(len, streams))


def test_expected_tokens() -> None:
    window = Window(10, 14)
    assert expected_tokens(window, switched_s=11, rate_before=100, rate_after=10) == 130
    assert expected_tokens(window, switched_s=None, rate_before=100, rate_after=10) == 400
    assert expected_tokens(window, switched_s=99, rate_before=100, rate_after=10) == 400
    assert expected_tokens(window, switched_s=9, rate_before=100, rate_after=10) == 40


def steady(start_s: float, end_s: float, gap_s: float, *, silent: tuple[float, float] = (0, 0)) -> list[float]:
    return [t for t in np.arange(start_s, end_s, gap_s) if not silent[0] < t < silent[1]]


def test_an_undisturbed_refactoring_costs_nothing() -> None:
    times = TokenTimes([steady(i / 40, 30, 0.1) for i in range(4)])
    found = assess([trial(Window(10, 12), before=Window(2, 9), after=Window(13, 20))], times)
    assert (found.num, found.num_done) == (1, 1)
    assert found.p99_ratio == pytest.approx(1)
    assert found.max_ratio == pytest.approx(1)
    assert found.loss == pytest.approx(0, abs=0.02)
    assert found.idle_gaps_ms.count == pytest.approx(4 * 140, abs=10)


def test_a_stop_of_a_second_is_found_in_gap_and_throughput() -> None:
    times = TokenTimes([steady(0, 30, 0.1, silent=(10.55, 11.55))] * 4)
    found = assess([trial(Window(10, 12), before=Window(2, 9), after=Window(13, 20))], times)
    assert found.gaps_ms.max == pytest.approx(1100)
    assert found.max_ratio == pytest.approx(11)
    assert found.p50_ratio == pytest.approx(1)
    assert found.loss == pytest.approx(0.5, abs=0.03)


def test_a_stop_that_outlasts_the_window_is_not_lost() -> None:
    times = TokenTimes([steady(0, 30, 0.1, silent=(11.55, 12.95))])
    found = assess([trial(Window(10, 12), before=Window(2, 9), after=Window(13, 20))], times)
    assert found.gaps_ms.max == pytest.approx(1500)


def test_the_expected_rate_changes_at_the_switch() -> None:
    times = TokenTimes([steady(0, 11, 0.1) + steady(11, 30, 0.2)])
    found = assess([trial(Window(10, 12), before=Window(2, 9), after=Window(13, 20), switched_at=1001.0)], times)
    assert found.expected_tokens == pytest.approx(15, rel=0.05)
    assert found.loss == pytest.approx(0, abs=0.07)


def test_a_window_at_rest_between_two_counts_once() -> None:
    times = TokenTimes([steady(0, 60, 0.1)])
    windows = [Window(0, 10), Window(15, 25), Window(30, 40)]
    trials = [
        trial(Window(11, 14), before=windows[0], after=windows[1]),
        trial(Window(26, 29), before=windows[1], after=windows[2], outcome=Outcome.ABORTED),
    ]
    found = assess(trials, times)
    assert found.idle_gaps_ms.count == pytest.approx(300, abs=3)
    assert (found.num, found.num_done) == (2, 1)
    assert found.seconds == 6


def test_nothing_measured() -> None:
    found = assess([trial(Window(1, 2), before=Window(0, 1), after=Window(2, 3))], TokenTimes([]))
    assert (found.p99_ratio, found.loss, found.num_tokens) == (None, None, 0)


@pytest.mark.parametrize(("offset_s", "requested_s"), [(990, 10.0), (0, 10.5), (2000, 9.9)])
def test_the_servers_clock_is_believed_within_what_the_client_saw(offset_s: float, requested_s: float) -> None:
    window = refactoring_window(record(), asked_s=9.9, answered_s=10.5, clock_offset_s=offset_s)
    assert window == Window(requested_s, requested_s + 2.0)


def test_peak_memory() -> None:
    samples = [(0.0, 90), (1.0, 100), (2.0, 250), (3.0, 180), (9.0, 999)]
    assert peak_extra_bytes(samples, before=Window(0, 1.5), during=Window(1.6, 4)) == 150
    assert peak_extra_bytes(samples, before=Window(4, 5), during=Window(1.6, 4)) is None
    assert extra_memory(trial(Window(1.6, 4), before=Window(0, 1.5), after=Window(5, 6)), samples) == 150
