"""Output lengths are told from what has been generated, long before the requests end."""

from __future__ import annotations

import heapq

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexpipe_serve.planner.lengths import OutputLengths

TOKEN_S = 0.05


def play(lengths, requests, *, until, token_s=TOKEN_S):
    """Each request, (arrival, tokens, whether it ends well), gets a token every ``token_s``."""
    events = [(at, i, 0) for i, (at, _, _) in enumerate(requests)]
    heapq.heapify(events)
    while events and events[0][0] <= until:
        at, i, num_tokens = heapq.heappop(events)
        if num_tokens:
            lengths.generated(at, 1, num_before=num_tokens - 1)
        _, length, ends_well = requests[i]
        if num_tokens < length:
            heapq.heappush(events, (at + token_s, i, num_tokens + 1))
        elif ends_well:
            lengths.ended(at, num_tokens)
        else:
            lengths.left(num_tokens)
    return lengths


def told_along(requests, *, until, every_s):
    """What is told from time to time, while each request gets a token every ``TOKEN_S``."""
    events = sorted((at + i * TOKEN_S, i, n) for at, n, _ in requests for i in range(1, n + 1))
    lengths, told, index = OutputLengths(), {}, 0
    for now in np.arange(every_s, until, every_s):
        while index < len(events) and events[index][0] <= now:
            at, num_tokens, length = events[index]
            lengths.generated(at, 1, num_before=num_tokens - 1)
            if num_tokens == length:
                lengths.ended(at, length)
            index += 1
        told[float(now)] = lengths.told(float(now))
    return told


def steady(rate, length, *, begin, end):
    return [(at, length, True) for at in np.arange(begin, end, 1 / rate)]


@pytest.mark.parametrize("length", [2, 40, 400])
def test_equal_lengths_in_a_steady_flow(length):
    lengths = play(OutputLengths(), steady(3.0, length, begin=0.0, end=120.0), until=120.0)
    assert lengths.told(120.0).mean == pytest.approx(length, rel=0.1)


@pytest.mark.parametrize("kind", ["geometric", "lognormal"])
def test_lengths_that_vary_without_a_bias_towards_the_short(kind):
    rng = np.random.default_rng(7)
    told, ended = [], []
    for _ in range(6):
        mean = 150.0
        draws = rng.geometric(1 / mean, 500) if kind == "geometric" else np.ceil(rng.lognormal(4.51, 1.0, 500))
        times = np.cumsum(rng.exponential(0.2, 500))
        requests = [(float(at), int(n), True) for at, n in zip(times, draws, strict=True)]
        lengths = play(OutputLengths(), requests, until=25.0)
        told.append(lengths.told(25.0))
        ended.append(np.mean([n for at, n, _ in requests if at + n * TOKEN_S <= 25.0]))
    means, cvs = np.mean(told, axis=0)
    assert means == pytest.approx(150.0, rel=0.15)
    assert 0.75 < cvs < 1.4  # 1 and 1.3; of the longest nothing is known yet
    assert np.mean(ended) < 0.8 * 150.0  # what a mean over the ended says


def test_longer_outputs_are_seen_long_before_one_has_ended():
    requests = [*steady(3.0, 2, begin=0.0, end=100.0), *steady(0.6, 224, begin=100.0, end=130.0)]
    seen = {at: told.mean for at, told in told_along(requests, until=130, every_s=1.0).items()}
    assert seen[99] == pytest.approx(2.0, rel=0.1)
    assert seen[105] > 10  # the first ends at 111
    assert seen[109] > 40
    assert seen[114] == pytest.approx(224, rel=0.1)
    assert seen[128] == pytest.approx(224, rel=0.1)


def test_of_a_shift_between_equal_lengths_no_variance_is_told():
    """The mean knew of the shift and the CV did not: a queue was foretold where all were alike."""
    requests = [*steady(3.0, 4, begin=0.0, end=14.0), *steady(0.85, 160, begin=14.0, end=50.0)]
    told = told_along(requests, until=50.0, every_s=0.5)
    assert max(lengths.cv for at, lengths in told.items() if at >= 17.0) < 0.05


def test_shorter_outputs_are_seen_as_soon_as_they_end():
    requests = [*steady(0.6, 224, begin=0.0, end=100.0), *steady(3.0, 2, begin=100.0, end=125.0)]
    lengths = play(OutputLengths(), requests, until=125.0)
    assert lengths.told(125.0).mean < 20


def test_few_short_outputs_behind_a_burst_of_long_ones_are_believed():
    """As on a server: 20 requests of 64 tokens at once, then 16 of 4, four at a time."""
    burst = [(0.1 * i, 64, True) for i in range(20)]
    short = [(10.0 + 2.0 * (i // 4), 4, True) for i in range(16)]
    lengths = OutputLengths()
    play(lengths, [*burst, *short], until=18.0)
    assert lengths.told(18.0).mean < 6


@pytest.mark.parametrize("num_together", [12, 20, 64])
def test_many_ends_at_once_are_no_short_outputs(num_together):
    """Requests that came together end together; nothing has become shorter, however few tokens a short window holds."""
    together = [(40.0 * (i // num_together), 400, True) for i in range(3 * num_together)]
    lengths = play(OutputLengths(), together, until=100.02)
    assert lengths.told(100.02).mean == pytest.approx(400, rel=0.15)


def test_young_requests_after_a_pause_are_not_short():
    """All at once and none at its end: that looked as if outputs had become longer, and then as short as they were."""
    requests = [*steady(3.0, 100, begin=0.0, end=60.0), *[(100.0, 100, True)] * 64]
    for until in (100.5, 101.0, 102.0, 104.0):
        lengths = OutputLengths()
        play(lengths, requests, until=90.0)
        assert lengths.told(90.0).mean == 100
        play(lengths, [(100.0, 100, True)] * 64, until=until)
        assert lengths.told(until).mean == pytest.approx(100, rel=0.05)


def test_what_fails_is_no_end():
    good = play(OutputLengths(), steady(2.0, 50, begin=0.0, end=60.0), until=60.0).told(60.0).mean
    # Every other request breaks off half-way: its tokens count, its end does not.
    broken = [
        (at, 50 if i % 2 else 25, bool(i % 2)) for i, (at, _, _) in enumerate(steady(4.0, 50, begin=0.0, end=60.0))
    ]
    told = play(OutputLengths(), broken, until=60.0).told(60.0).mean
    assert good == pytest.approx(50, rel=0.1)
    assert told == pytest.approx(50, rel=0.1)
    assert len(OutputLengths()._running) == 0


def test_nothing_at_first_and_the_last_known_after_silence():
    lengths = OutputLengths()
    assert lengths.told(3.0).mean == 0.0
    play(lengths, steady(2.0, 10, begin=5.0, end=20.0), until=30.0)
    known = lengths.told(30.0).mean
    assert lengths.told(1e4).mean == known > 0


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 5), st.integers(0, 5), st.integers(0, 2), st.integers(1, 50)), max_size=60),
    st.floats(0, 400),
)
def test_it_is_no_more_than_the_longest_whatever_happens(history, wait):
    lengths, at, longest, running = OutputLengths(), 0.0, 0, {}
    for gap, request, kind, count in history:
        at += gap
        num_before = running.get(request, 0)
        if kind == 0 or not num_before:
            lengths.generated(at, count, num_before=num_before)
            running[request] = num_before + count
            longest = max(longest, running[request])
        elif kind == 1:
            lengths.ended(at, running.pop(request))
        else:
            lengths.left(running.pop(request))
        assert 0 <= lengths.told(at).mean <= longest + 1e-6
    assert 0 <= lengths.told(at + wait).mean <= longest + 1e-6
    assert len(lengths._seconds) <= 181
    assert sorted(lengths._running.elements()) == sorted(running.values())
