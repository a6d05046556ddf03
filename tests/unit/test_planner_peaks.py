"""What it may cost to have given capacity away."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexpipe_serve.planner.peaks import Peaks


def risk_s(peaks: Peaks, *, now: float, max_rate: float = 1.0) -> float:
    return peaks.risk_s(now=now, work=1.0, max_rate=max_rate, present_rate=3.0, duration_s=20.0, horizon_s=60.0)


def test_a_peak_weighs_by_its_height_and_fades() -> None:
    peaks = Peaks()
    assert risk_s(peaks, now=0.0) == 0
    peaks.note(0.0, 2.0)
    # Twenty seconds at 1 a second beyond capacity, and as long again to work them off.
    assert risk_s(peaks, now=1.0) == pytest.approx(20 * (20 + 20) / 2, rel=0.15)
    assert risk_s(peaks, now=600.0) == pytest.approx(risk_s(peaks, now=1.0) / 10)
    assert risk_s(peaks, now=1.0, max_rate=2.2) == 0
    peaks.note(300.0, 0.5)
    assert risk_s(peaks, now=600.0) == pytest.approx(risk_s(peaks, now=1.0) / 10)
    peaks.note(590.0, 2.0)
    assert risk_s(peaks, now=600.0) == pytest.approx(risk_s(peaks, now=1.0))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0, 1e6), max_size=300))
def test_peaks_take_little_memory(loads: list[float]) -> None:
    peaks = Peaks()
    for second, load in enumerate(loads):
        peaks.note(float(second), load)
    kept = [load for _, load in peaks._peaks]
    assert kept == sorted(set(kept), reverse=True)
    assert len(kept) <= 1 + math.log(1e6 / 1e-6) / math.log(1.05) or min(kept) < 1e-6
