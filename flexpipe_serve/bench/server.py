"""A server of the benchmark's own: ``flexpipe serve`` in a process tree that is gone afterwards."""

import asyncio
import contextlib
import copy
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml

from flexpipe_serve.config import merge
from flexpipe_serve.errors import ConfigError
from flexpipe_serve.supervised import end_with_parent

_COMMAND = "import sys; from flexpipe_serve.cli import main; sys.exit(main(sys.argv[1:]))"
_READY_S = 300.0
_STOP_S = 30.0
_DEPLOY_S = 60.0
_POLL_S = 0.25


def read_config(path: Path) -> dict[str, Any]:
    """A Serve configuration with one application. Raises ConfigError where it is not one."""
    try:
        config = yaml.safe_load(path.read_text())
        if len(config["applications"]) != 1:
            raise ConfigError(f"{path} has {len(config['applications'])} applications; the benchmark needs one")
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is no Serve configuration ({error!r}); see serve_config.yaml") from None
    return dict(config)


def adapt_config(
    config: Mapping[str, Any], *, args: Mapping[str, Any], user_config: Mapping[str, Any]
) -> dict[str, Any]:
    """A copy of a Serve configuration with other ``args`` and another ``user_config``, see :func:`merge`."""
    adapted: dict[str, Any] = copy.deepcopy(dict(config))
    app = adapted["applications"][0]
    app["args"] = merge(app.get("args") or {}, args)
    deployments = app.setdefault("deployments", [])
    if not any(each.get("name") == "Router" for each in deployments):
        deployments.append({"name": "Router"})
    router = router_of(adapted)
    router["user_config"] = merge(router.get("user_config") or {}, user_config)
    return adapted


def router_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The Router deployment of a configuration that has one."""
    (app,) = config["applications"]
    router: dict[str, Any] = next(each for each in app["deployments"] if each["name"] == "Router")
    return router


@contextlib.contextmanager
def running_server(config: Mapping[str, Any], *, log: Path) -> Iterator[str]:
    """Serves a configuration on a free port of the loopback. Gives the URL when it answers.

    Args:
        config: of Serve.
        log: file for the server's output.

    Raises:
        ConfigError: it does not come up; with the last lines it said.
    """
    with tempfile.TemporaryDirectory(prefix="flexpipe-bench-") as folder:
        file = Path(folder) / "serve_config.yaml"
        file.write_text(yaml.safe_dump(dict(config)))
        port = _free_port()
        with log.open("a") as output:
            process = subprocess.Popen(
                [sys.executable, "-c", _COMMAND, "serve", str(file), "--port", str(port), "--host", "127.0.0.1"],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                # Ctrl-C at the terminal is for the benchmark, which ends its server itself.
                start_new_session=True,
                preexec_fn=_prepare_child,
            )
        try:
            url = f"http://127.0.0.1:{port}"
            _wait_until_ready(process, url, log)
            yield url
        finally:
            _stop(process)


async def deploy(config: Mapping[str, Any], *, url: str, log: Path) -> None:
    """What ``serve deploy`` does, on a server of :func:`running_server`; returns when the configuration is in force,
    though a layout that it asks for may take longer.

    Args:
        config: the one that was served, with another ``user_config``.
        url: of the server.
        log: of the server.

    Raises:
        ConfigError: it is refused, or not in force within a minute.
    """
    api = f"{await asyncio.to_thread(_dashboard, url, log)}/api/serve/applications/"
    port = int(url.rpartition(":")[2])
    body = {**config, "http_options": {"host": "127.0.0.1", "port": port}}
    (app,) = config["applications"]
    wanted = router_of(config)["user_config"]
    deadline = time.monotonic() + _DEPLOY_S
    async with httpx.AsyncClient(timeout=30) as client:
        answer = await client.put(api, json=body)
        if answer.is_error:
            raise ConfigError(f"the server refuses the configuration: {answer.text[:300]}")
        while time.monotonic() < deadline:
            state = (await client.get(api)).json()["applications"][app["name"]]
            router = state["deployments"].get("Router") or {}
            in_force = router.get("status") == "HEALTHY" and router["deployment_config"]["user_config"] == wanted
            if in_force and state["status"] == "RUNNING":
                return
            await asyncio.sleep(_POLL_S)
    raise ConfigError(f"{url}: the configuration is not in force after {_DEPLOY_S:.0f} s; see {log}")


def _dashboard(url: str, log: Path) -> str:
    """Where the server's Ray listens: it says so a moment after it answers requests."""
    deadline = time.monotonic() + _DEPLOY_S
    while time.monotonic() < deadline:
        text = log.read_text(errors="replace")
        found = re.search(rf"at {re.escape(url)}/v1 after .*?dashboard (http\S+)", text, re.DOTALL)
        if found:
            return found[1]
        time.sleep(_POLL_S)
    raise ConfigError(f"the server at {url} does not say where its dashboard is; see {log}")


def _wait_until_ready(process: "subprocess.Popen[bytes]", url: str, log: Path) -> None:
    deadline = time.monotonic() + _READY_S
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                return
        time.sleep(_POLL_S)
    lines = log.read_text(errors="replace").strip().splitlines()
    raise ConfigError(f"the server did not come up; see {log}: " + " | ".join(lines[-3:]))


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """As Ctrl-C at its terminal would; then a kill to whatever is left of the tree."""
    tree = []
    with contextlib.suppress(psutil.NoSuchProcess):
        tree = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_STOP_S)
    _, alive = psutil.wait_procs(tree, timeout=1)
    for each in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    process.kill()
    process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _prepare_child() -> None:
    # Started in the background, a shell has us ignore interrupts, and a child would inherit that.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    end_with_parent()  # a benchmark that is killed, as by timeout(1), ends no server itself


def default_log() -> Path:
    """Where servers write when nobody says otherwise."""
    return Path(tempfile.gettempdir()) / f"flexpipe-bench-{os.getpid()}.log"
