"""The monitor sees what is there: rates, gaps, lengths, trends, stalls; and never more than it may keep."""

import sys

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexpipe_serve.bench.arrivals import gamma_arrivals
from flexpipe_serve.errors import ConfigError
from flexpipe_serve.planner.demand import DemandMonitor, trigger_of
from flexpipe_serve.planner.stall import StallDetector
from flexpipe_serve.planner.types import Trigger
from flexpipe_serve.planner.windows import ArrivalWindow, MomentWindow


def monitor_of(times, *, num_prompt_tokens=100):
    monitor = DemandMonitor()
    for at in times:
        monitor.arrived(float(at), num_prompt_tokens=num_prompt_tokens)
    return monitor


def demand_at(monitor, at):
    return monitor.demand(float(at), num_waiting=0, num_running=0)


def gamma_times(num_requests, *, rate, cv, seed):
    wave = gamma_arrivals(num_requests, rate=rate, cv=cv, num_prompt_tokens=1, num_output_tokens=1, seed=[seed])
    return np.array([arrival.at_s for arrival in wave])


def gamma_demands(cv):
    """What is told after every tenth of 1,500 arrivals, in four histories."""
    demands = []
    for seed in range(4):
        monitor = DemandMonitor()
        for i, at in enumerate(gamma_times(1500, rate=5.0, cv=cv, seed=seed)):
            monitor.arrived(float(at), num_prompt_tokens=1)
            if i % 10 == 9:
                demands.append(demand_at(monitor, at))
    return demands


gaps = st.lists(st.floats(0, 20), min_size=1, max_size=80)


@settings(max_examples=50)
@given(gaps=gaps, wait=st.floats(0, 40), window_s=st.sampled_from([15.0, 60.0]))
def test_an_arrival_window_is_what_its_slots_cover(gaps, wait, window_s):
    times = np.cumsum(gaps)
    now = float(times[-1]) + wait
    window = ArrivalWindow(window_s)
    for at in times:
        window.add(float(at))
    begin = (np.floor(now / (window_s / 15)) - 14) * (window_s / 15)
    inside = times[np.floor(times / (window_s / 15)) >= np.floor(now / (window_s / 15)) - 14]
    covered = now - max(begin, times[0])
    assert window_s * 14 / 15 - 1e-6 <= now - begin <= window_s + 1e-6
    assert window.num_arrivals(now) == len(inside)
    assert window.rate(now) == pytest.approx(len(inside) / max(covered, 5.0))
    own = np.diff(inside)
    expected = own.std() / own.mean() if len(own) and own.mean() > 0 else 0.0
    assert window.gaps(now).cv == pytest.approx(expected, rel=1e-6, abs=1e-5)


@settings(max_examples=40)
@given(values=st.lists(st.tuples(st.floats(0, 5), st.floats(0.1, 1e4)), min_size=1, max_size=60))
def test_moments_of_a_window(values):
    window = MomentWindow(30.0)
    times = np.cumsum([gap for gap, _ in values])
    for at, (_, value) in zip(times, values, strict=True):
        window.add(float(at), value)
    inside = np.array([v for at, (_, v) in zip(times, values, strict=True) if at // 2 >= times[-1] // 2 - 14])
    moments = window.moments(float(times[-1]))
    assert moments.count == len(inside)
    assert moments.mean == pytest.approx(inside.mean())
    assert moments.cv == pytest.approx(inside.std() / inside.mean(), abs=1e-6)


@pytest.mark.parametrize("cv", [0.5, 1.0, 2.0, 4.0, 8.0])
def test_gamma_arrivals(cv):
    rate = 25.0
    seen = []
    for seed in range(5):
        times = gamma_times(5500, rate=rate, cv=cv, seed=seed)
        demand = demand_at(monitor_of(times), times[-1])
        assert demand.num_arrived == 5500
        seen.append(demand.cv_by_window["180s"])
    # A window's own CV scatters, by much where gaps are so unequal; the mean over seeds must not be off.
    assert np.mean(seen) == pytest.approx(cv, rel=0.05 + 0.015 * cv)


def test_the_rate_of_gamma_arrivals():
    times = gamma_times(4000, rate=10.0, cv=1.0, seed=3)
    rates = []
    monitor = DemandMonitor()
    for i, at in enumerate(times):
        monitor.arrived(float(at), num_prompt_tokens=1)
        if at > 30 and i % 10 == 0:
            rates.append(demand_at(monitor, at).rate)
    assert np.mean(rates) == pytest.approx(10.0, rel=0.05)
    assert np.std(rates) < 1.5


def test_nothing_is_known_at_first_and_silence_is_seen():
    monitor = DemandMonitor()
    demand = demand_at(monitor, 5.0)
    assert (demand.rate, demand.rate_gradient, demand.cv, demand.cv_by_window) == (0.0, 0.0, 1.0, {})
    monitor = monitor_of(np.arange(0, 60, 0.5))
    assert demand_at(monitor, 60.0).rate == pytest.approx(2.0, rel=0.1)
    assert demand_at(monitor, 100.0).rate < 1.0
    assert demand_at(monitor, 400.0).rate == 0.0


def test_a_rate_that_fell_is_not_told_again():
    """The long windows still had what was before, and now and then they were believed again."""
    change = 60.0
    times = [*np.arange(0, change, 1 / 3), *np.arange(change, change + 100, 1 / 0.7)]
    monitor, told = DemandMonitor(), {}
    for at in times:
        monitor.arrived(float(at), num_prompt_tokens=1)
        told[at] = demand_at(monitor, at)
    late = [demand.rate for at, demand in told.items() if at > change + 8]
    assert max(late) < 1.2
    assert late[-1] == pytest.approx(0.7, rel=0.1)
    assert told[times[179]].num_alike == 180
    assert min(demand.num_alike for at, demand in told.items() if at > change) < 10


@pytest.mark.parametrize(("before", "after"), [(3.0, 0.8), (0.8, 3.0), (2.0, 0.0)])
def test_when_a_rate_has_changed(before, after):
    change = 20.0
    window = ArrivalWindow(5.0)
    times = [*np.arange(0, change, 1 / before), *(np.arange(change, change + 4, 1 / after) if after else ())]
    for at in times:
        window.add(float(at))
    since, num_since = window.change(change + 4, before)
    assert since == pytest.approx(change, abs=0.7)
    assert abs(num_since - sum(at >= since for at in times)) <= 1  # one may lie on the edge


@pytest.mark.parametrize(("before", "after"), [(3.0, 0.85), (0.8, 3.0)])
@pytest.mark.parametrize("cv", [0.1, 0.3])
def test_two_steady_rates_are_no_burst(before, after, cv):
    """Gaps of both together have a CV near 1, and a queue was foretold where arrivals came as by a clock."""
    change, told = 30.0, []
    for seed in range(6):
        old = gamma_times(200, rate=before, cv=cv, seed=seed)
        new = change + gamma_times(200, rate=after, cv=cv, seed=100 + seed)
        monitor = DemandMonitor()
        for at in [*old[old < change], *new[new < change + 12]]:
            monitor.arrived(float(at), num_prompt_tokens=1)
            demand = demand_at(monitor, at)
        told.append((demand.cv, demand.cv_by_window["60s"]))
    cvs, mixed = np.mean(told, axis=0)
    assert cvs == pytest.approx(cv, abs=0.15)
    assert mixed > cv + 0.2


@pytest.mark.parametrize("cv", [1.0, 4.0])
def test_bursts_change_no_rate(cv):
    demands = gamma_demands(cv)
    assert sum(demand.num_alike < demand.num_arrived for demand in demands) < 0.3 * len(demands)


def test_prompts_that_come_seldom_are_told_from_the_last_few():
    """Fewer came in 15 s than a window needs, and those of before counted for half a minute."""
    monitor = monitor_of(np.arange(0, 20, 1 / 3), num_prompt_tokens=96)
    for index in range(5):
        monitor.arrived(20.0 + 3 * index, num_prompt_tokens=32)
    for at in (32.0, 32.5, 40.0, 60.0):
        assert demand_at(monitor, at).prompt_tokens == 32


def test_a_few_long_prompts_are_chance():
    rng = np.random.default_rng(3)
    monitor, told = DemandMonitor(), []
    for index, length in enumerate(rng.exponential(100, 2000)):
        monitor.arrived(0.5 * index, num_prompt_tokens=1 + int(length))
        if index > 100:
            told.append(demand_at(monitor, 0.5 * index).prompt_tokens)
    assert np.mean(np.abs(np.array(told) / 100 - 1) > 0.5) < 0.03


def test_a_burst_at_the_start_is_no_rate():
    assert demand_at(monitor_of([1.0] * 30), 1.0).rate == 6.0


def test_a_rising_rate_is_told_before_it_is_there():
    # From 2 to 20 requests a second in 60 s.
    rng = np.random.default_rng(5)
    steady = np.cumsum(rng.exponential(0.5, 120))
    t, times = float(steady[-1]), list(steady)
    begin = t
    while t < begin + 60:
        t += rng.exponential(1 / (2 + 18 * (t - begin) / 60))
        times.append(t)
    monitor, told = DemandMonitor(), []
    for at in times:
        monitor.arrived(float(at), num_prompt_tokens=1)
        told.append((at, demand_at(monitor, at).rate_gradient))
    assert all(gradient == 0.0 for at, gradient in told if 20 < at < begin)
    assert next(at for at, gradient in told if gradient > 0) < begin + 25
    assert np.mean([g for at, g in told if at > begin + 30]) == pytest.approx(0.3, rel=0.35)


@pytest.mark.parametrize("cv", [1.0, 4.0])
def test_a_burst_is_no_trend(cv):
    demands = gamma_demands(cv)
    assert sum(demand.rate_gradient != 0.0 for demand in demands) < 0.05 * len(demands)


def test_lengths_follow_a_shift_and_outlast_silence():
    monitor = DemandMonitor(prompt_token_work=0.1)
    for i in range(400):
        late = i >= 300
        monitor.arrived(i * 0.4, num_prompt_tokens=50 if late else 500)
        num_output_tokens = 200 if late else 20
        monitor.generated(i * 0.4, num_tokens=num_output_tokens, num_before=0)
        monitor.finished(i * 0.4, num_output_tokens=num_output_tokens, latency_s=4.0 if late else 1.0)
        demand_at(monitor, i * 0.4)
    demand = demand_at(monitor, 160.0)
    assert demand.prompt_tokens == 50
    assert demand.output_tokens == pytest.approx(200, rel=0.05)
    assert demand.service_cv == pytest.approx(0.0, abs=1e-6)
    assert demand_at(monitor, 10_000.0).output_tokens == demand.output_tokens


def test_work_varies_with_both_lengths():
    rng = np.random.default_rng(0)
    monitor = DemandMonitor(prompt_token_work=0.1)
    prompts, outputs = rng.exponential(1000, 400).astype(int), rng.exponential(50, 400).astype(int)
    for i in range(400):
        monitor.arrived(i * 0.01, num_prompt_tokens=int(prompts[i]))
        monitor.generated(i * 0.01, num_tokens=int(outputs[i]), num_before=0)
        monitor.finished(i * 0.01, num_output_tokens=int(outputs[i]), latency_s=1.0)
    work = prompts * 0.1 + outputs
    assert demand_at(monitor, 4.0).service_cv == pytest.approx(work.std() / work.mean(), rel=0.1)


def test_memory_is_bounded():
    def size(monitor):
        windows = [w._gaps for w in monitor._arrivals]
        windows += monitor._prompt_tokens._windows
        return max(len(w._slots) for w in windows), len(monitor._stalls._normal), len(monitor._stalls._sorted)

    monitor = DemandMonitor()
    for i in range(20_000):
        monitor.arrived(i * 0.02, num_prompt_tokens=i % 100)
        monitor.finished(i * 0.02, num_output_tokens=i % 30, latency_s=(i % 50) * 0.1)
    assert size(monitor) == (15, 256, 256)
    assert len(monitor._last_gaps) <= 256
    assert sys.getsizeof(monitor._stalls._sorted) < 10_000


def test_why_a_decision_is_due():
    calm = demand_at(monitor_of(np.arange(0, 60, 0.5)), 60.0)
    surging = msgspec.structs.replace(calm, rate_gradient=0.02)
    assert trigger_of(calm, is_stalled=False, horizon_s=60.0) is Trigger.INTERVAL
    assert trigger_of(surging, is_stalled=False, horizon_s=60.0) is Trigger.GRADIENT
    assert trigger_of(surging, is_stalled=False, horizon_s=10.0) is Trigger.INTERVAL
    assert trigger_of(surging, is_stalled=True, horizon_s=60.0) is Trigger.STALL


@pytest.mark.parametrize("windows_s", [(), (60.0, 15.0), (15.0, 15.0), (0.0, 15.0)])
def test_windows_must_rise(windows_s):
    with pytest.raises(ConfigError, match="must be positive and rise"):
        DemandMonitor(windows_s)


class TestStalls:
    def detector(self, rng):
        detector = StallDetector(give_up_after_s=100.0)
        for i in range(300):
            detector.add(i, rng.lognormal(0, 0.6))
            assert not detector.is_stalled
        return detector

    def test_begins_and_ends(self):
        rng = np.random.default_rng(1)
        detector = self.detector(rng)
        base = detector.baseline_s
        assert base == pytest.approx(np.exp(-0.674 * 0.6), rel=0.1)
        begun = [i for i in range(20) if detector.add(300 + i, 4 * rng.lognormal(0, 0.6)) or detector.is_stalled]
        assert 2 < begun[0] < 16
        assert begun[-1] == 19
        ended = [i for i in range(20) if detector.add(320 + i, rng.lognormal(0, 0.6)) or not detector.is_stalled]
        assert 2 <= ended[0] < 16

    def test_what_lasts_is_the_new_normal(self):
        rng = np.random.default_rng(2)
        detector = self.detector(rng)
        for i in range(200):
            detector.add(300 + i, 4 * rng.lognormal(0, 0.6))
        assert not detector.is_stalled
        assert detector.baseline_s == pytest.approx(4 * np.exp(-0.674 * 0.6), rel=0.2)

    def test_between_the_two_bounds_it_stays_as_it_is(self):
        detector = StallDetector(give_up_after_s=1000.0)
        for i in range(100):
            detector.add(i, 1.0)
        for i in range(100, 120):
            detector.add(i, 1.4)
        assert not detector.is_stalled
        for i in range(120, 140):
            detector.add(i, 1.6)
        assert detector.is_stalled
        for i in range(140, 160):
            detector.add(i, 1.3)
        assert detector.is_stalled
        for i in range(160, 180):
            detector.add(i, 1.15)
        assert not detector.is_stalled
