"""Statistics of traces are what their definitions say, on recorded and on made-up arrivals."""

import math
from pathlib import Path
from statistics import fmean, median, pstdev

import numpy as np
import pytest

from flexpipe_serve.bench.arrivals import gamma_arrivals, read_trace
from flexpipe_serve.planner.demand import DemandMonitor
from flexpipe_serve.simulate.trace_statistics import trace_statistics

EXCERPT = Path(__file__).parent.parent / "data" / "azure_code_2023_excerpt.csv"


def statistics_of(arrivals, **options):
    return trace_statistics(
        [a.at_s for a in arrivals],
        [a.num_prompt_tokens for a in arrivals],
        [a.num_output_tokens for a in arrivals],
        **options,
    )


def cv(values):
    return pstdev(map(float, values)) / fmean(values)


def test_a_recorded_trace():
    arrivals = read_trace(EXCERPT)
    times = [a.at_s for a in arrivals]
    statistics = statistics_of(arrivals)
    assert statistics.num_requests == 400
    assert statistics.span_s == times[-1]
    assert statistics.gap_cv == pytest.approx(cv(np.diff(times)))
    assert [window.window_s for window in statistics.windows] == [15.0, 180.0]
    windows = [[t for t in times if 15 * i <= t < 15 * (i + 1)] for i in range(math.ceil(times[-1] / 15))]
    cvs = [cv(np.diff(w)) for w in windows if len(w) >= 10]
    window = statistics.windows[0]
    assert window.num_windows == len(cvs) > 3
    assert window.cv_median == pytest.approx(median(cvs))
    assert window.cv_max == pytest.approx(max(cvs))
    counts = [len(w) for w in windows[:-1]]
    assert window.busiest == pytest.approx(max(counts) / fmean(counts))
    assert window.count_cv == pytest.approx(cv(counts))
    prompts = sorted(a.num_prompt_tokens for a in arrivals)
    assert statistics.prompt_tokens.max == prompts[-1]
    assert prompts[199] <= statistics.prompt_tokens.p50 <= prompts[200]
    assert statistics.prompt_tokens.mean == pytest.approx(fmean(prompts))


def test_the_monitor_sees_the_same_burst_in_a_recorded_trace():
    arrivals = read_trace(EXCERPT)
    monitor = DemandMonitor()
    for arrival in arrivals:
        monitor.arrived(arrival.at_s, num_prompt_tokens=arrival.num_prompt_tokens)
    now = arrivals[-1].at_s
    begin = (now // 4 - 14) * 4  # the 60-s window's slots are 4 s
    inside = [a.at_s for a in arrivals if a.at_s >= begin]
    demand = monitor.demand(now, num_waiting=0, num_running=0)
    assert demand.cv_by_window["60s"] == pytest.approx(cv(np.diff(inside)))


def test_made_up_arrivals():
    arrivals = gamma_arrivals(20_000, rate=10.0, cv=2.0, num_prompt_tokens=7, num_output_tokens=3, seed=[1])
    statistics = statistics_of(arrivals)
    assert statistics.rate == pytest.approx(10.0, rel=0.05)
    assert statistics.gap_cv == pytest.approx(2.0, rel=0.05)
    assert statistics.windows[1].cv_median == pytest.approx(2.0, rel=0.05)
    assert statistics.output_tokens.p99 == 3


def test_a_metronome_has_no_bursts():
    (window,) = statistics_of(
        gamma_arrivals(100, rate=2.0, cv=0.0, num_prompt_tokens=1, num_output_tokens=1, seed=[0]), windows_s=(15.0,)
    ).windows
    assert window.cv_max == pytest.approx(0.0, abs=1e-9)
    assert window.busiest == pytest.approx(1.0, abs=0.03)


def test_gaps_of_nothing_are_counted():
    statistics = trace_statistics([0.0, 1.0, 1.0, 1.0, 2.0], [1] * 5, [1] * 5)
    assert statistics.zero_gap_share == 0.5


def test_windows_with_few_arrivals_have_no_cv():
    (window,) = statistics_of(
        gamma_arrivals(40, rate=0.1, cv=1.0, num_prompt_tokens=1, num_output_tokens=1, seed=[0]), windows_s=(15.0,)
    ).windows
    assert window.num_windows == 0
    assert math.isnan(window.cv_median)
