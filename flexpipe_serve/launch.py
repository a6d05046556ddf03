"""``flexpipe serve``: Ray, Serve and the application in one foreground command, leaving nothing behind."""

from __future__ import annotations

import argparse
import contextlib
import copy
import re
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import yaml
from pydantic import ValidationError
from rich.console import Console
from rich.markup import escape

from flexpipe_serve.config import ServeArgs, UserConfig, parse
from flexpipe_serve.deployments.live_config import ROUTER
from flexpipe_serve.engine.assemble import layout_of, model_name
from flexpipe_serve.errors import ConfigError
from flexpipe_serve.local_clusters import FOLDER_PREFIX
from flexpipe_serve.model.source import load_spec, resolve_source
from flexpipe_serve.private_cluster import prepare_environment, start_cluster
from flexpipe_serve.supervised import supervised

if TYPE_CHECKING:
    from ray.serve.schema import ServeDeploySchema

DEFAULT_PORT = 8000
_USUAL_CONFIG = Path("serve_config.yaml")
_NO_CONFIG: dict[str, Any] = {
    "proxy_location": "HeadOnly",
    "applications": [
        {"name": "flexpipe", "route_prefix": "/", "import_path": "flexpipe_serve.deployments.app:build"},
    ],
}
_READY_S = 600.0
_POLL_S = 0.1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``flexpipe serve``."""
    parser.add_argument(
        "config", nargs="?", type=Path, help=f"Serve configuration (default: {_USUAL_CONFIG} where it is there)"
    )
    parser.add_argument("--model", metavar="SOURCE", help="demo, a folder, or a hub id, instead of the configuration's")
    parser.add_argument("--stages", type=int, metavar="N", help="to begin with, instead of the configuration's layout")
    parser.add_argument("--port", type=int, help="HTTP port (default: the configuration's, or 8000)")
    parser.add_argument("--host", help="HTTP address (default: the configuration's, or 127.0.0.1)")


def main(args: argparse.Namespace) -> int:
    """Serve until interrupted. Returns the exit status."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    started = time.monotonic()

    def run(folder: str) -> int:
        try:
            _serve(args, folder, console, started=started)
        except ConfigError as error:
            console.print(f"[red]error:[/red] {escape(str(error))}")
        return 2

    status = supervised(run, prefix=FOLDER_PREFIX)
    if status is not None:
        return status
    console.print("stopped")
    return 0


def _serve(args: argparse.Namespace, folder: str, console: Console, *, started: float) -> None:
    """Raises ConfigError, or does not return."""
    prepare_environment(folder)
    config = _read_config(args)
    http = config.http_options
    http.port = args.port or http.port
    http.host = args.host or http.host
    _check_port(http.host, http.port)
    name = _prepare(config)
    dashboard = start_cluster(folder)
    _deploy(config)
    base_url = f"http://{'127.0.0.1' if http.host == '0.0.0.0' else http.host}:{http.port}"
    _wait_until_ready(base_url)
    seconds = time.monotonic() - started
    console.print(
        f"[green]serving {escape(name)}[/green] at {base_url}/v1 after {seconds:.1f} s; dashboard {dashboard}"
    )
    console.print(_first_request(base_url, name), markup=False)
    while True:
        time.sleep(3600)


def _read_config(args: argparse.Namespace) -> ServeDeploySchema:
    from ray.serve.schema import ServeDeploySchema  # only now: it reads the environment when it is imported

    path: Path = args.config or _USUAL_CONFIG
    content = copy.deepcopy(_NO_CONFIG) if args.config is None and not path.exists() else _read_yaml(path)
    content["http_options"] = {"host": "127.0.0.1", "port": DEFAULT_PORT, **(content.get("http_options") or {})}
    try:
        config = ServeDeploySchema(**content)
    except ValidationError as error:
        reasons = (f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise ConfigError(f"{path}: {_one_line('; '.join(reasons))}") from None
    _change(config, args)
    return config


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read as YAML: {_one_line(error)}") from None
    if not isinstance(config, dict) or not isinstance(config.get("applications"), list):
        raise ConfigError(f"{path} has no list 'applications'; see serve_config.yaml of the project.")
    return config


def _change(config: ServeDeploySchema, args: argparse.Namespace) -> None:
    """What the command line says counts more than the configuration."""
    from flexpipe_serve.deployments.served_config import deployment_of, user_config_of  # imports Serve

    if args.model is None and args.stages is None:
        return
    if len(config.applications) != 1:
        raise ConfigError("--model and --stages are for a configuration of one application; write them into it.")
    (app,) = config.applications
    if args.model is not None:
        app.args = {**app.args, "model": {"source": args.model}}  # name and limits there are another model's
    if args.stages is not None:
        router = deployment_of(app, ROUTER)
        router.user_config = {**user_config_of(router), "layout": {"stages": args.stages}}


def _prepare(config: ServeDeploySchema) -> str:
    """What needs no cluster: check the configuration, fetch the model. Returns the model's name."""
    from flexpipe_serve.deployments.served_config import user_config_of  # imports Serve

    name = ""
    for app in config.applications:
        args = parse(ServeArgs, app.args)
        spec = load_spec(resolve_source(args.model.source), max_model_len=args.model.max_model_len)
        for deployment in app.deployments:
            user_config = parse(UserConfig, user_config_of(deployment))
            layout_of(user_config.layout, num_layers=spec.num_layers)
        name = name or model_name(args)
    return name


def _check_port(host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(f"port {port} on {host} cannot be taken ({error.strerror}); choose another.") from None


def _deploy(config: ServeDeploySchema) -> None:
    from ray.serve._private.api import serve_start

    client = serve_start(
        http_options=config.http_options.model_dump(),
        proxy_location=config.proxy_location,
        controller_options=config.controller_options,
    )
    client.deploy_apps(config, _blocking=False)


def _wait_until_ready(base_url: str) -> None:
    """Raises ConfigError with the reason when the application cannot be deployed."""
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
                messages = [d.message for d in app.deployments.values() if d.message] or [app.message]
                reason = _config_error(messages[0])
                if reason is None and app.status in ("DEPLOY_FAILED", "UNHEALTHY"):
                    reason = messages[0].strip().splitlines()[-1]
                if reason is not None:
                    raise ConfigError(f"application {name!r} cannot be deployed: {reason}")
        time.sleep(_POLL_S)
    raise ConfigError(f"the application did not answer within {_READY_S:.0f} s.")


def _config_error(message: str) -> str | None:
    """The error of ours in a message of Serve, which holds tracebacks; Serve would try again for nothing."""
    found = re.findall(r"^flexpipe_serve\.errors\.(?:ConfigError|UnsupportedModelError): (.+)$", message, re.MULTILINE)
    return found[-1] if found else None


def _one_line(text: object) -> str:
    return " ".join(str(text).split())


def _first_request(base_url: str, model: str) -> str:
    return (
        "try:\n\n"
        f"  curl -N {base_url}/v1/chat/completions -H 'Content-Type: application/json' \\\n"
        f'    -d \'{{"model": "{model}", "stream": true, "max_tokens": 100,'
        ' "messages": [{"role": "user", "content": "Why is the sky blue?"}]}\'\n\n'
        f"  flexpipe status --url {base_url}\n"
        f"  flexpipe refactor --stages 3 --url {base_url}\n\n"
        f'from Python: flexpipe_serve.connect("{base_url}"), or through Ray: flexpipe_serve.connect()\n'
    )
