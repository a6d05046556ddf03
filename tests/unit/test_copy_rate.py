"""The controller of a snapshot's rate, against model machines that snapshot messages slow down."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexpipe_serve.kv.copy_rate import LEAST_SHARE, CopyRate

MB = 1_000_000


class Machine:
    """Steps of 15 ms each; every message adds to the step that it meets."""

    def __init__(self, rate: CopyRate, *, seconds_per_mb: float, noise: float = 0.0, seed: int = 0) -> None:
        self.rate = rate
        self.now = 0.0
        self.num_bytes = 0
        self._not_before = 0.0
        """The limit is the copy's own to keep."""
        self._max_bytes_per_s = 40 * MB
        self._seconds_per_mb = seconds_per_mb
        self._noise = noise
        self._rng = random.Random(seed)

    def run(self, num_steps: int, *, num_tokens: int | None = 8) -> float:
        """Steps; returns the bytes a second that were sent."""
        started, num_bytes = self.now, self.num_bytes
        for _ in range(num_steps):
            end = self.now + 0.015 * (1 + self._noise * self._rng.gauss(0, 1))
            while (at := max(self.rate.ready_at(self.now), self._not_before)) < end:
                self.now = at
                self._not_before = at + MB / 4 / self._max_bytes_per_s
                self.rate.on_sent(MB // 4, now=at)
                self.num_bytes += MB // 4
                end += self._seconds_per_mb / 4
            self.now = end
            self.rate.on_step(end, num_tokens=self._rng.randrange(99) if num_tokens is None else num_tokens)
        return (self.num_bytes - num_bytes) / (self.now - started)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 999))
def test_steps_that_suffer_slow_the_copy_and_others_do_not(seed: int) -> None:
    def settled(seconds_per_mb: float) -> CopyRate:
        rate = CopyRate(max_bytes_per_s=40 * MB)
        machine = Machine(rate, seconds_per_mb=seconds_per_mb, noise=0.02, seed=seed)
        machine.run(1500)
        return rate

    assert settled(0.01).bytes_per_s(0.0) == LEAST_SHARE * 40 * MB, "0.4 s a second at the limit: down to the least"
    free = settled(0.0)
    assert free.bytes_per_s(0.0) > 20 * MB
    assert abs(free.slowdown) < 0.02


def test_it_follows_a_machine_that_becomes_busy() -> None:
    rate = CopyRate(max_bytes_per_s=40 * MB)
    machine = Machine(rate, seconds_per_mb=0.0)
    machine.run(600)
    assert rate.bytes_per_s(machine.now) == 40 * MB
    machine._seconds_per_mb = 0.002  # 8 % of the time at the limit, 2 % at the least
    machine.run(600)
    assert rate.bytes_per_s(machine.now) <= 20 * MB
    assert 0.005 < rate.slowdown < 0.06


def test_without_steps_the_limit_alone_holds() -> None:
    rate = CopyRate(max_bytes_per_s=40 * MB)
    assert rate.ready_at(3.0) == 3.0
    machine = Machine(rate, seconds_per_mb=0.0)
    machine.run(3)  # in the middle of a quiet spell
    at = rate.ready_at(machine.now)
    assert machine.now < at <= machine.now + 1.0
    assert rate.ready_at(at) == at
    rate.on_sent(MB, now=at)
    assert rate.bytes_per_s(at) == 40 * MB


@pytest.mark.parametrize("num_tokens", [8, None])
def test_messages_go_in_every_second_also_where_no_two_steps_are_alike(num_tokens: int | None) -> None:
    rate = CopyRate(max_bytes_per_s=40 * MB)
    machine = Machine(rate, seconds_per_mb=0.001)
    for _ in range(20):
        assert machine.run(70, num_tokens=num_tokens) > 2 * MB


def test_a_single_long_step_is_no_slowdown() -> None:
    rate = CopyRate(max_bytes_per_s=40 * MB)
    machine = Machine(rate, seconds_per_mb=0.0)
    machine.run(18)
    machine.now += 0.4  # in a loud spell
    machine.run(600)
    assert rate.bytes_per_s(machine.now) == 40 * MB
