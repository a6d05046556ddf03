"""Which gap belongs to which window, and what follows: on times with known answers."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexpipe_serve.bench.memory import peak_extra_bytes
from flexpipe_serve.bench.tour import Step
from flexpipe_serve.bench.trial import Trial, assess, at_rest, extra_memory, refactoring_window
from flexpipe_serve.bench.windows import TokenTimes, Window, split
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


def test_a_window_is_split_at_the_switch() -> None:
    window = Window(10, 14)
    assert split(window, 11) == (Window(10, 11), Window(11, 14))
    assert split(window, None) == (window, Window(14, 14))
    assert split(window, 99) == (window, Window(14, 14))
    assert split(window, 9) == (Window(10, 10), window)


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


def test_layouts_of_different_speed_make_no_difference_by_themselves() -> None:
    """The window is mostly of the slow layout, the rest mostly of the fast one: neither is a cost."""
    times = TokenTimes([steady(0, 14, 0.1) + steady(14, 40, 0.2)])
    found = assess(
        [trial(Window(13, 30), before=Window(1, 12), after=Window(31, 34), switched_at=1001.0, seconds=17.0)], times
    )
    assert found.p50_ratio == pytest.approx(1)
    assert found.p99_ratio == pytest.approx(1)
    assert found.loss == pytest.approx(0, abs=0.05)
    # All before the switch: the new layout's gaps are nobody's measure.
    found = assess([trial(Window(12.5, 13.5), before=Window(1, 12), after=Window(31, 34), switched_at=1002.0)], times)
    assert found.idle_gaps_ms.max == pytest.approx(100)


def test_moments_of_prompts_count_nowhere() -> None:
    """A prompt of a second in the window, and one at rest: both stop the streams."""
    prompts = [Window(10.55, 11.55), Window(4.05, 5.05)]
    tokens = [t for t in steady(0, 30, 0.1) if not any(p.start_s < t < p.end_s for p in prompts)]
    found = assess(
        [trial(Window(10, 12), before=Window(2, 9), after=Window(13, 20))], TokenTimes([tokens] * 4, left_out=prompts)
    )
    assert found.max_ratio == pytest.approx(1)
    assert found.loss == pytest.approx(0, abs=0.15)
    assert found.gaps_ms.count < 60


@given(times_of_streams, st.lists(edges.map(lambda cuts: Window(cuts[0], cuts[-1])), max_size=4), edges)
def test_what_is_left_out_is_left_out(streams: list[list[float]], left_out: list[Window], cuts: list[float]) -> None:
    times, window = TokenTimes(streams, left_out=left_out), Window(cuts[0], cuts[-1])

    def is_out(start: float, end: float) -> bool:
        return any(out.start_s <= end and start <= out.end_s for out in left_out)

    tokens = [t for stream in streams for t in stream if window.start_s < t <= window.end_s]
    assert times.count(window) == sum(not is_out(t, t) for t in tokens)
    gaps = [(a, b) for stream in streams for a, b in itertools.pairwise(stream)]
    assert len(times.gaps_within(window)) == sum(
        not is_out(a, b) for a, b in gaps if a >= window.start_s and b <= window.end_s
    )
    at = np.linspace(window.start_s, window.end_s, 2001)
    share = np.mean([not is_out(t, t) for t in at])
    assert times.seconds(window) == pytest.approx(share * window.seconds, abs=window.seconds / 400 * 2)


def test_noise_is_what_windows_at_rest_show_among_themselves() -> None:
    windows = [Window(0, 8), Window(15, 25)]
    trials = [trial(Window(9, 14), before=windows[0], after=windows[1])]
    quiet = at_rest(trials)
    assert [(each.before.start_s, each.window, each.after.end_s) for each in quiet] == [
        (0, Window(2, 6), 8), (15, Window(17.5, 22.5), 25),
    ]  # fmt: skip
    assert [each.switched_s for each in quiet] == [4, 20]
    even = assess(quiet, TokenTimes([steady(0, 30, 0.1)]))
    assert (even.num, even.p99_ratio) == (2, pytest.approx(1))
    uneven = assess(quiet, TokenTimes([steady(0, 30, 0.1, silent=(19.05, 19.95))]))
    assert uneven.max_ratio == pytest.approx(10)
