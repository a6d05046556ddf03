"""Background work: its priority, its errors, and that it gets on where the cores are taken."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from flexpipe_serve.pipeline import background
from flexpipe_serve.pipeline.background import gently, in_background

NUM_WORKERS = 3
NUM_ROUNDS = 4


class Rests:
    """Counts rests, and how many there are at the same time; ``all_meet`` makes every rest wait for the others'."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.most_at_once = 0
        self.all_meet: threading.Barrier | None = None
        self._at_once = 0
        self._lock = threading.Lock()

    def sleep(self, seconds: float) -> None:
        with self._lock:
            self.seconds.append(seconds)
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        if self.all_meet is not None:
            self.all_meet.wait()
        time.sleep(0.001)  # so that others can be in here too
        with self._lock:
            self._at_once -= 1


def burn(pace: Callable[[], None]) -> float:
    """A few rounds of 2 ms of work; the CPU seconds they take at least."""
    pace()
    for _ in range(NUM_ROUNDS):
        end = time.thread_time() + 0.002
        while time.thread_time() < end:
            pass
        pace()
    return NUM_ROUNDS * 0.002


def in_threads(work: Callable[[], object]) -> None:
    with ThreadPoolExecutor(NUM_WORKERS) as pool:
        for done in [pool.submit(work) for _ in range(NUM_WORKERS)]:
            done.result()


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


@pytest.fixture
def rests(monkeypatch: pytest.MonkeyPatch) -> Rests:
    """Takes the place of the clock while work rests; the machine never has cores to spare, and nobody starves."""
    rests = Rests()
    monkeypatch.setattr(background, "_SPARE_CORES", 1e9)
    monkeypatch.setattr(background, "_PATIENCE_S", 1e9)
    clock = SimpleNamespace(sleep=rests.sleep, monotonic=time.monotonic, thread_time=time.thread_time)
    monkeypatch.setattr(background, "time", clock)
    return rests


def test_work_rests_in_proportion_to_what_it_used(rests: Rests, tmp_path: Path) -> None:
    used = gently(burn, folder=tmp_path)
    assert len(rests.seconds) == NUM_ROUNDS
    assert sum(rests.seconds) >= 49 * used, "2 % of a core"


def test_work_of_several_has_one_share(rests: Rests, tmp_path: Path) -> None:
    """Stages of a node that load at the same time have it together: they rest one after the other."""
    in_threads(lambda: gently(burn, folder=tmp_path))
    assert len(rests.seconds) == NUM_WORKERS * NUM_ROUNDS
    assert rests.most_at_once == 1


def test_nobody_waits_for_a_folder_that_is_gone(rests: Rests, tmp_path: Path) -> None:
    rests.all_meet = threading.Barrier(NUM_WORKERS, timeout=60)
    in_threads(lambda: gently(burn, folder=tmp_path / "gone"))
    assert rests.most_at_once == NUM_WORKERS


def test_a_thread_gives_way_also_where_little_priority_is_left_and_none_can_be_had() -> None:
    """Ray's workers are at 15. Copies went to a fixed 10: above the steps, or refused where not for the superuser."""
    code = """
import os, threading
from flexpipe_serve.pipeline.background import lower_priority
os.nice(15)
if os.getuid() == 0:
    os.setuid(65534)
def run():
    lower_priority(10)
    print(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()), os.getpriority(os.PRIO_PROCESS, os.getpid()))
thread = threading.Thread(target=run)
thread.start()
thread.join()
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["19", "15"], found.stderr
