"""``flexpipe serve``: Ray, Serve and the application in one foreground command, leaving nothing behind."""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import yaml
from rich.console import Console

from flexpipe_serve.config import ServeArgs, UserConfig, parse
from flexpipe_serve.engine.assemble import layout_of, model_name
from flexpipe_serve.errors import ConfigError
from flexpipe_serve.kv.domain import sweep_stale
from flexpipe_serve.model.source import load_spec, resolve_source

DEFAULT_PORT = 8000
_FAST_PROXY = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    # Else a replica that stops waits 30 s for proxies on other machines to notice; there are none.
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
}
_QUIET = {
    "RAY_AUTH_MODE": "disabled",  # a private cluster whose dashboard listens on the loopback only
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
_READY_S = 600.0
_POLL_S = 0.1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``flexpipe serve``."""
    parser.add_argument("config", nargs="?", default="serve_config.yaml", type=Path, help="Serve configuration")
    parser.add_argument("--port", type=int, help="HTTP port (default: the configuration's, or 8000)")
    parser.add_argument("--host", help="HTTP address (default: the configuration's, or 127.0.0.1)")


def main(args: argparse.Namespace) -> int:
    """Serve until interrupted. Returns the exit status."""
    console = Console(stderr=True, highlight=False)
    started = time.monotonic()
    try:
        config = _read_config(args.config)
        http = config.setdefault("http_options", {})
        http["port"] = args.port or http.get("port", DEFAULT_PORT)
        http["host"] = args.host or http.get("host", "127.0.0.1")
        _check_port(http["host"], http["port"])
        name = _prepare(config)
    except ConfigError as error:
        console.print(f"[red]error:[/red] {error}")
        return 2
    with _interrupt_on_sigterm(), _ray(console) as dashboard:
        try:
            _deploy(config)
            base_url = f"http://{'127.0.0.1' if http['host'] == '0.0.0.0' else http['host']}:{http['port']}"
            _wait_until_ready(base_url)
            seconds = time.monotonic() - started
            console.print(
                f"[green]serving {name}[/green] at {base_url}/v1 after {seconds:.1f} s; dashboard {dashboard}"
            )
            console.print(_first_request(base_url, name), markup=False, soft_wrap=True)
            while True:
                time.sleep(3600)
        except KeyboardInterrupt:
            console.print("stopping")
            return 0
        except RuntimeError as error:
            console.print(f"[red]error:[/red] {error}")
            return 1


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read as YAML: {error}") from None
    if not isinstance(config, dict) or not isinstance(config.get("applications"), list):
        raise ConfigError(f"{path} has no list 'applications'; see serve_config.yaml of the project.")
    return config


def _prepare(config: dict[str, Any]) -> str:
    """What needs no cluster: check the configuration, fetch the model. Returns the model's name."""
    name = ""
    for app in config["applications"]:
        args = parse(ServeArgs, app.get("args"))
        spec = load_spec(resolve_source(args.model.source), max_model_len=args.model.max_model_len)
        for deployment in app.get("deployments", []):
            layout_of(parse(UserConfig, deployment.get("user_config")).layout, num_layers=spec.num_layers)
        name = name or model_name(args)
    return name


def _check_port(host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(f"port {port} on {host} cannot be taken ({error.strerror}); choose another.") from None


@contextlib.contextmanager
def _interrupt_on_sigterm() -> Iterator[None]:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    former = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)


@contextlib.contextmanager
def _ray(console: Console) -> Iterator[str]:
    """A Ray cluster of our own on free ports, in a session folder of its own; gone afterwards."""
    os.environ.update({key: os.environ.get(key, value) for key, value in (_FAST_PROXY | _QUIET).items()})
    # Not the default folder: another Ray on this machine would be found by its latest-session link no more.
    folder = tempfile.mkdtemp(prefix=f"flexpipe-{os.getuid()}-")
    import ray

    context = ray.init(address="local", include_dashboard=True, dashboard_host="127.0.0.1", log_to_driver=False,
                       logging_level="error", _temp_dir=folder)  # fmt: skip
    try:
        yield f"http://{context.dashboard_url}"
    finally:
        with _no_interrupts(), console.status("stopping"):
            from ray import serve

            with contextlib.suppress(Exception):  # the cluster goes next, whatever state Serve is in
                for app in serve.status().applications:
                    serve.delete(app)
            ray.shutdown()
            sweep_stale()
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _no_interrupts() -> Iterator[None]:
    former = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, former)


def _deploy(config: dict[str, Any]) -> None:
    from ray.serve._private.api import serve_start
    from ray.serve.schema import ServeDeploySchema

    schema = ServeDeploySchema(**config)
    client = serve_start(
        http_options=schema.http_options.model_dump(),
        proxy_location=schema.proxy_location,
        controller_options=schema.controller_options,
    )
    client.deploy_apps(schema, _blocking=False)


def _wait_until_ready(base_url: str) -> None:
    """Raises RuntimeError with the reason when the application cannot be deployed."""
    from ray import serve

    deadline = time.monotonic() + _READY_S
    next_look = time.monotonic() + 2.0
    while time.monotonic() < deadline:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{base_url}/health", timeout=5).status_code == 200:
                return
        if time.monotonic() > next_look:
            next_look += 1.0
            for name, app in serve.status().applications.items():
                if app.status in ("DEPLOY_FAILED", "UNHEALTHY"):
                    reasons = [d.message for d in app.deployments.values() if d.message] or [app.message]
                    raise RuntimeError(f"application {name!r} cannot be deployed: {reasons[0]}")
        time.sleep(_POLL_S)
    raise RuntimeError(f"the application did not answer within {_READY_S:.0f} s.")


def _first_request(base_url: str, model: str) -> str:
    return (
        "try:\n\n"
        f"  curl -N {base_url}/v1/chat/completions -H 'Content-Type: application/json' \\\n"
        f'    -d \'{{"model": "{model}", "stream": true, "max_tokens": 100,'
        ' "messages": [{"role": "user", "content": "Why is the sky blue?"}]}\'\n\n'
        f"  curl {base_url}/flexpipe/status\n"
    )
