"""``flexpipe serve`` as a process of its own, and what a test wants to know of it from outside."""

from __future__ import annotations

import contextlib
import copy
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml

START_S = 280
STOP_S = 120


def wait_until(condition: Callable[[], Any], *, timeout_s: float, what: str) -> Any:
    """The condition's value once it is true; what other processes do cannot be waited for otherwise."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what}: not within {timeout_s} s"
        time.sleep(0.05)
    return value


def alive_after(processes: Iterable[psutil.Process], *, timeout_s: float) -> list[psutil.Process]:
    """Those that have not ended by then. Zombies have: orphans are reaped by process 1, which may take its time."""

    def alive() -> list[psutil.Process]:
        found = []
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    with contextlib.suppress(AssertionError):
        wait_until(lambda: not alive(), timeout_s=timeout_s, what="their end")
    return alive()


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def serve_command(config: Path, port: int) -> list[str]:
    """The command as a user types it."""
    return [str(Path(sys.executable).with_name("flexpipe")), "serve", str(config), "--port", str(port)]


def clean_environment() -> dict[str, str]:
    """Without what Ray left in this process's environment."""
    return {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}


class Served:
    """A running ``flexpipe serve``.

    Args:
        config: its configuration; :meth:`deploy` changes it live.
        folder: for the configuration and the log.
    """

    def __init__(self, config: dict[str, Any], *, folder: Path) -> None:
        self.port = free_port()
        self.base_url = f"http://127.0.0.1:{self.port}"
        self.log = folder / "serve.log"
        path = folder / "config.yaml"
        path.write_text(yaml.safe_dump(config))
        self._config = config
        started = time.monotonic()
        with self.log.open("w") as log:
            self.process = psutil.Popen(
                serve_command(path, self.port), stdout=log, stderr=log, env=clean_environment(), start_new_session=True
            )
        try:
            self.dashboard = self._wait_until_serving()
        except BaseException:
            self.kill()
            raise
        self.start_seconds = time.monotonic() - started

    def _wait_until_serving(self) -> str:
        def serving() -> re.Match[str] | None:
            assert self.process.poll() is None, self.log.read_text()
            return re.search(r"dashboard (http\S+)", self.log.read_text())

        return str(wait_until(serving, timeout_s=START_S, what="flexpipe serve")[1])

    # ------------------------------------------------------------------ the application

    def status(self) -> dict[str, Any]:
        """``/flexpipe/status``."""
        response = httpx.get(f"{self.base_url}/flexpipe/status", timeout=90)
        response.raise_for_status()
        return dict(response.json())

    def try_status(self) -> dict[str, Any] | None:
        """The status; None while nobody answers."""
        with contextlib.suppress(httpx.HTTPError):
            return self.status()
        return None

    def complete(self, prompt: str | list[int], *, num_tokens: int, **fields: Any) -> str:
        """Greedy text after ``prompt``."""
        body = {"prompt": prompt, "max_tokens": num_tokens, "temperature": 0, "ignore_eos": True, **fields}
        response = httpx.post(f"{self.base_url}/v1/completions", json=body, timeout=120)
        assert response.status_code == 200, response.text
        return str(response.json()["choices"][0]["text"])

    def wait_until_idle(self) -> dict[str, Any]:
        """The status once nothing runs and no block is used."""

        def idle() -> dict[str, Any] | None:
            status = self.status()
            busy = status["queue"]["num_running"] or status["queue"]["num_waiting"] or status["kv"]["num_used_blocks"]
            return None if busy else status

        return dict(wait_until(idle, timeout_s=90, what="all blocks back"))

    # ------------------------------------------------------------------ Serve

    def deploy(self, config: dict[str, Any], *, until: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
        """What ``serve deploy`` does. Returns the application's status once it satisfies ``until``."""
        body = copy.deepcopy(config)
        body["http_options"] = {"host": "127.0.0.1", "port": self.port}
        url = f"{self.dashboard}/api/serve/applications/"
        httpx.put(url, json=body, timeout=60).raise_for_status()
        self._config = config

        def reached() -> dict[str, Any] | None:
            status = self.try_status()
            return status if status is not None and status["state"] == "serving" and until(status) else None

        return dict(wait_until(reached, timeout_s=120, what="the new configuration"))

    def reset(self, config: dict[str, Any]) -> None:
        """Back to a configuration that served before, if it is another."""
        if self._config != config:
            stages = config["applications"][0]["deployments"][0]["user_config"]["layout"]["stages"]
            former: set[int] = set()
            if self._config["applications"][0]["args"] != config["applications"][0]["args"]:  # then a new replica comes
                former = {stage["pid"] for stage in self.status()["stages"]}
            self.deploy(
                config,
                until=lambda s: s["layout"]["num_stages"] == stages and not former & {p["pid"] for p in s["stages"]},
            )

    def replica(self) -> dict[str, Any] | None:
        """Serve's view of the only replica; None while there is no running one."""
        answer = httpx.get(f"{self.dashboard}/api/serve/applications/", timeout=90).json()
        apps = answer["applications"].values()
        replicas = [r for app in apps for d in app["deployments"].values() for r in d["replicas"]]
        running = [r for r in replicas if r["state"] == "RUNNING"]
        return running[0] if len(running) == 1 else None

    def user_config(self) -> dict[str, Any]:
        """The ``user_config`` that Serve has for the Router, as it was given."""
        answer = httpx.get(f"{self.dashboard}/api/serve/applications/", timeout=90).json()
        ((deployment,),) = (app["deployed_app_config"]["deployments"] for app in answer["applications"].values())
        return dict(deployment["user_config"])

    # ------------------------------------------------------------------ processes and files

    def processes(self) -> list[psutil.Process]:
        """The command's and all that came of it."""
        return [self.process, *self.process.children(recursive=True)]

    def stages(self) -> list[psutil.Process]:
        """The stages' processes, in pipeline order."""
        return [psutil.Process(stage["pid"]) for stage in self.status()["stages"]]

    def folders(self) -> list[Path]:
        """Ray's session folder, and the stages' folder in shared memory."""
        (gcs,) = [p for p in self.processes() if p.name() == "gcs_server"]
        log_dir = next(arg for arg in gcs.cmdline() if arg.startswith("--log_dir=")).partition("=")[2]
        session = next(parent for parent in Path(log_dir).parents if parent.name.startswith("flexpipe-"))
        return [session, *{shared_folder(stage) for stage in self.stages()}]

    def stop(self, number: signal.Signals, *, whole_group: bool = False) -> int:
        """Send a signal (to the whole group, as a terminal does) and wait. Returns the exit status."""
        if whole_group:
            os.killpg(self.process.pid, number)
        else:
            self.process.send_signal(number)
        return int(self.process.wait(STOP_S))

    def kill(self) -> None:
        """For a test that went wrong."""
        if self.process.poll() is None:
            processes = self.processes()
            with contextlib.suppress(subprocess.TimeoutExpired, psutil.TimeoutExpired):
                self.stop(signal.SIGTERM)
            for process in processes:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()


def shared_folder(stage: psutil.Process) -> Path:
    """Where the KV of a stage's node lies: it holds the lock file in there."""
    (lock,) = [Path(f.path) for f in stage.open_files() if Path(f.path).name == "lock" and "/flexpipe-" in f.path]
    return lock.parent


@contextlib.contextmanager
def nothing_left_of(served: Served) -> Iterator[None]:
    """Asserts that all processes and folders of ``served`` go within the block (and a moment)."""
    processes, folders = served.processes(), served.folders()
    assert len(processes) > 5
    assert all(folder.is_dir() for folder in folders)
    yield
    assert not alive_after(processes, timeout_s=90)
    assert not [folder for folder in folders if folder.exists()]
