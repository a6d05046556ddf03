"""Devices are given back after a window without need, down to the floor."""

import math

from hypothesis import given
from hypothesis import strategies as st

from flexpipe_serve.placement.elastic import ElasticDevices

DEVICES = [f"d{i}" for i in range(10)]


def test_idle_for_the_window_and_above_the_floor():
    elastic = ElasticDevices()
    assert elastic.update(0.0, held=DEVICES, in_use=DEVICES) == ()
    assert (elastic.peak, elastic.floor) == (10, 3)
    assert elastic.update(10.0, held=DEVICES, in_use=DEVICES[:8]) == ()
    assert elastic.update(20.0, held=DEVICES, in_use=DEVICES[:1]) == ()
    assert elastic.update(309.9, held=DEVICES, in_use=DEVICES[:1]) == ()
    assert elastic.update(310.0, held=DEVICES, in_use=DEVICES[:1]) == ("d8", "d9")
    kept = DEVICES[:8]
    # 30 % of ten always stay: of eight that are held five go, the longest idle first.
    assert elastic.update(320.0, held=kept, in_use=kept[:1]) == ("d1", "d2", "d3", "d4", "d5")
    assert elastic.update(9e4, held=["d0", "d6", "d7"], in_use=["d0"]) == ("d6", "d7")
    assert elastic.floor == 1, "the peak is a day old"


@given(st.floats(1, 299))
def test_a_load_that_comes_and_goes_within_the_window_keeps_all(period):
    elastic = ElasticDevices()
    at = 0.0
    for i in range(60):
        at += period
        assert elastic.update(at, held=DEVICES, in_use=DEVICES if i % 2 == 0 else []) == ()


@given(st.lists(st.tuples(st.floats(0, 200), st.sets(st.sampled_from(DEVICES))), max_size=30))
def test_only_what_was_idle_all_the_window_goes_and_never_the_floor(history):
    elastic = ElasticDevices(window_s=300, floor_share=0.3, peak_window_s=1000)
    held = list(DEVICES)
    seen = []
    at = 0.0
    for gap, wanted in history:
        at += gap
        held = sorted({*held, *wanted})  # taken at once
        seen.append((at, wanted))
        given_back = elastic.update(at, held=held, in_use=wanted)
        peak = max(len(used) for when, used in seen if at - when <= 1000)
        assert elastic.peak == peak
        held = [device for device in held if device not in given_back]
        assert not wanted.intersection(given_back)
        assert not given_back or len(held) >= math.ceil(0.3 * peak)
        for device in given_back:
            before = [when for when, used in seen if device in used]
            assert at - (before[-1] if before else 0.0) >= 300
