"""Background work: its priority, its errors, and that it gets on where the cores are taken."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from flexpipe_serve.pipeline import background
from flexpipe_serve.pipeline.background import gently, in_background


def scheduling() -> tuple[int, int]:
    return os.sched_getscheduler(0), os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


def test_priority_is_lowered_for_the_work_alone(tmp_path: Path) -> None:
    before = scheduling()
    assert in_background(scheduling) == (before[0], min(19, before[1] + 5))
    assert gently(lambda pace: scheduling(), folder=tmp_path)[0] == os.SCHED_IDLE
    assert scheduling() == before


@pytest.mark.parametrize("run", [in_background, lambda work: gently(lambda pace: work(), folder=Path("/"))])
def test_errors_come_back(run: Callable[[Callable[[], object]], object]) -> None:
    def fail() -> None:
        raise KeyError("x")

    with pytest.raises(KeyError):
        run(fail)


def test_work_that_starves_goes_on_with_a_share(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(background, "_PATIENCE_S", 0.02)
    done: list[int] = []
    policies: set[int] = set()
    wanted = 0.01

    def work(pace: Callable[[], None]) -> float:
        started, used = time.monotonic(), time.thread_time()
        while len(done) < 10:
            if os.sched_getscheduler(0) == os.SCHED_IDLE:
                time.sleep(0.03)  # as if nobody let it run
            else:
                end = time.thread_time() + wanted / 10
                while time.thread_time() < end:
                    pass
            policies.add(os.sched_getscheduler(0))
            done.append(len(done))
            pace()
        return (time.thread_time() - used) / (time.monotonic() - started)

    share = gently(work, folder=tmp_path)
    assert done == list(range(10)), "it goes on where it was"
    assert len(policies) == 2
    assert share < 0.1


def test_work_of_several_has_one_share(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each alone would have it; stages of a node that load at the same time have it together."""
    monkeypatch.setattr(background, "_SPARE_CORES", 1e9)  # never
    shares: list[float] = []

    def work(pace: Callable[[], None]) -> None:
        pace()
        for _ in range(4):
            end = time.thread_time() + 0.002
            while time.thread_time() < end:
                pass
            pace()

    def measure(folders: list[Path]) -> float:
        threads = [threading.Thread(target=lambda f=folder: gently(work, folder=f)) for folder in folders]
        started = time.monotonic()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return 0.008 * len(folders) / (time.monotonic() - started)

    shares = [measure([tmp_path]), measure([tmp_path] * 3), measure([tmp_path / "gone"] * 3)]
    assert shares[0] < 0.03
    assert shares[1] < 0.03
    assert shares[2] > shares[1]
