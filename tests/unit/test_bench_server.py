"""A benchmark's own server, which is gone when the benchmark is."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil

_BENCHMARK = """
import sys
from pathlib import Path
from flexpipe_serve.bench import server

server._COMMAND = "import os, time; print(os.getpid(), flush=True); time.sleep(3600)"
with server.running_server({"applications": []}, log=Path(sys.argv[1])):
    pass
"""
END_S = 60


def test_a_benchmark_that_is_killed_leaves_no_server(tmp_path: Path) -> None:
    log = tmp_path / "log"
    benchmark = subprocess.Popen([sys.executable, "-c", _BENCHMARK, str(log)])
    try:
        deadline = time.monotonic() + END_S
        while not (log.exists() and log.read_text().endswith("\n")):
            assert time.monotonic() < deadline
            assert benchmark.poll() is None
            time.sleep(0.02)
        server = psutil.Process(int(log.read_text()))
        assert server.status() != psutil.STATUS_ZOMBIE
    finally:
        benchmark.kill()
        benchmark.wait()
    deadline = time.monotonic() + END_S
    while server.is_running() and server.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.02)
