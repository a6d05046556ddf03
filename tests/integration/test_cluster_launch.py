"""``flexpipe serve`` that cannot start says why in one line; interrupted while it starts it leaves nothing behind."""

from __future__ import annotations

import copy
import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from served import Served, alive_after, clean_environment, free_port, serve_command, wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


@dataclass
class Launch:
    """A ``flexpipe serve`` that is watched until its end."""

    process: psutil.Popen
    descendants: set[psutil.Process] = field(default_factory=set)
    session: Path | None = None

    def look(self) -> list[str]:
        """Take note of what it started. Returns the names of its processes."""
        names = []
        for child in self.process.children(recursive=True):
            self.descendants.add(child)
            try:
                command = child.cmdline()
            except psutil.Error:
                continue
            names += [Path(part).name for part in command[:1]]
            for log_dir in (arg.partition("=")[2] for arg in command if arg.startswith("--log_dir=")):
                (self.session,) = [p for p in Path(log_dir).parents if p.name.startswith("flexpipe-")]
        return names

    def has_ended(self) -> bool:
        self.look()
        return self.process.poll() is not None


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Any]:
    """Starts the command with a configuration; whatever is left afterwards goes."""
    launches: list[Launch] = []

    def start(config: Any, *, port: int) -> Launch:
        path = tmp_path / "config.yaml"
        path.write_text(config if isinstance(config, str) else yaml.safe_dump(config))
        process = psutil.Popen(
            serve_command(path, port),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=clean_environment(),
            start_new_session=True,
        )
        launches.append(Launch(process))
        return launches[-1]

    yield start
    for launched in launches:
        for process in {launched.process, *launched.descendants}:
            if process.is_running():
                process.kill()


def ended(launched: Launch) -> str:
    """What it printed in all; nothing of it is left."""
    wait_until(launched.has_ended, timeout_s=240, what="the command's end")
    assert not alive_after(launched.descendants, timeout_s=90)
    assert launched.session is None or not launched.session.exists()
    return str(launched.process.stdout.read())


def assert_one_line(output: str, *parts: str) -> None:
    lines = output.strip().splitlines()
    assert len(lines) == 1, output
    assert lines[0].startswith("error: ")
    for part in parts:
        assert part in lines[0], output


def test_a_port_in_use(launch: Any, serve_config: dict[str, Any]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        launched = launch(serve_config, port=port)
        assert_one_line(ended(launched), f"port {port}", "choose another")
    assert launched.process.returncode == 2


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"args": {"devcie": "cpu"}}, ["devcie", "did you mean 'device'?"]),
        ({"deployments": [{"name": "Router", "user_config": {"layout": {"stages": 99}}}]}, ["99 stages", "4 layers"]),
        ({"deployments": "Router"}, ["applications.0.deployments", "list"]),
    ],
)
def test_a_configuration_that_is_wrong_by_itself(
    launch: Any, serve_config: dict[str, Any], changes: dict[str, Any], parts: list[str]
) -> None:
    config = copy.deepcopy(serve_config)
    app = config["applications"][0]
    app.update({**changes, "args": {**app["args"], **changes.get("args", {})}})
    launched = launch(config, port=free_port())
    assert_one_line(ended(launched), *parts)
    assert launched.process.returncode == 2


def test_a_memory_budget_that_is_too_small(launch: Any, serve_config: dict[str, Any], served: Served) -> None:
    """Only the stages know: Ray is up by then, and goes again. A server beside it neither hinders nor notices."""
    config = copy.deepcopy(serve_config)
    config["applications"][0]["args"]["memory_budget"] = "20MiB"
    launched = launch(config, port=free_port())
    assert_one_line(ended(launched), "is 20 MiB", "Raise memory_budget")
    assert launched.process.returncode == 2
    assert launched.session is not None
    assert served.complete("Once upon a time", num_tokens=5)


def test_interrupted_while_it_starts(launch: Any, serve_config: dict[str, Any]) -> None:
    """At a bad moment: parts of Ray are dead, so that nothing it is asked would be answered."""
    launched = launch(serve_config, port=free_port())
    controller = "ray::ServeController"
    wait_until(lambda: any(name.startswith(controller) for name in launched.look()), timeout_s=180, what=controller)
    (gcs,) = [process for process in launched.descendants if process.name() == "gcs_server"]
    gcs.kill()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGINT):
        os.killpg(launched.process.pid, number)
    assert "Traceback" not in ended(launched)
    assert launched.process.returncode == 0
