"""Nothing is left of a supervised command, whenever and however it ends."""

import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

PROGRAM = Path(__file__).with_name("supervised_program.py")
END_S = 60


@pytest.fixture
def start(tmp_path):
    started = []

    def start(what):
        process = subprocess.Popen(
            [sys.executable, str(PROGRAM), what],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "TMPDIR": str(tmp_path)},
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def begun(process):
    """The folder, and the ids of all processes."""
    folder, *pids = process.stdout.readline().split()
    return Path(folder), [int(pid) for pid in pids]


def is_alive(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def assert_gone(folder, processes):
    assert not folder.exists()
    assert not [process for process in processes if is_alive(process)]


def test_an_interrupt_ends_processes_that_heed_none(start):
    process = start("serve")
    folder, processes = begun(process)
    assert [is_alive(pid) for pid in processes] == [True] * 4
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=END_S) == ("interrupted\n", "")
    assert process.returncode == 0
    assert_gone(folder, processes)


def test_a_flood_of_signals_disturbs_neither_the_work_nor_the_end(start):
    process = start("serve")
    folder, processes = begun(process)
    while process.poll() is None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.killpg(process.pid, number)
    assert process.communicate(timeout=END_S) == ("interrupted\n", "")
    assert process.returncode == 0
    assert_gone(folder, processes)


@pytest.mark.parametrize("delay_s", [0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4])
def test_a_signal_at_any_moment_of_the_start(start, tmp_path, delay_s):
    process = start("serve")
    time.sleep(delay_s)  # the moment is the point: any will do
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=END_S)
    assert process.returncode in (0, -signal.SIGTERM)  # the latter before it had begun
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("what", "status", "says"), [("crash", 137, ""), ("fail", 1, "ValueError: no")])
def test_a_command_that_ends_by_itself_leaves_nothing_either(start, what, status, says):
    process = start(what)
    folder, processes = begun(process)
    out, err = process.communicate(timeout=END_S)
    assert out == f"{status}\n"
    assert says in err
    assert_gone(folder, processes)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the number of a system call")
def test_a_process_that_seems_a_zombie_is_ended_too(start):
    """Its threads would go on holding files and locks: a folder in shared memory was left behind."""
    process = start("headless")
    folder, processes = begun(process)
    assert process.communicate(timeout=END_S) == ("0\n", ""), "ends when all ends of the pipe are closed"
    assert_gone(folder, processes)


def test_a_supervisor_that_is_killed_takes_the_command_along(start):
    process = start("bare")
    folder, processes = begun(process)
    process.kill()
    deadline = time.monotonic() + END_S
    while folder.exists() or any(map(is_alive, processes)):
        assert time.monotonic() < deadline
        time.sleep(0.02)
