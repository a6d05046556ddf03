"""``flexpipe config``: what changes without a restart, shown and changed."""

from __future__ import annotations

import argparse
import json
from typing import Any

import yaml
from rich.console import Console

from flexpipe_serve.cli_server import server_arguments, with_handle
from flexpipe_serve.errors import ConfigError
from flexpipe_serve.handle import Handle


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``config`` to the parser of ``flexpipe``."""
    parser = commands.add_parser(
        "config",
        parents=[server_arguments()],
        help="show user_config, or change some of it without a restart",
        description="Shows the user_config in force, after changing the keys that are given. Serve keeps the change"
        " until a `serve deploy` sets what its file says.",
    )
    parser.add_argument(
        "changes",
        nargs="*",
        type=_change,
        metavar="KEY=VALUE",
        help="such as planner.mode=on, limits.max_waiting=100, layout.boundaries=[10,20]; null: the default",
    )
    parser.set_defaults(run=with_handle(_config))


def _change(text: str) -> tuple[list[str], Any]:
    path, equals, value = text.partition("=")
    if not equals or not all(path.split(".")):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form KEY=VALUE, such as planner.mode=on")
    try:
        return path.split("."), json.loads(value)
    except ValueError:
        return path.split("."), value


def _config(args: argparse.Namespace, handle: Handle, console: Console) -> int:
    config = handle.configure(**_sections(args.changes)) if args.changes else handle.config()
    console.print(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False).rstrip(), markup=False)
    return 0


def _sections(changes: list[tuple[list[str], Any]]) -> dict[str, Any]:
    sections: dict[str, Any] = {}
    for path, value in changes:
        section = sections
        for key in path[:-1]:
            section = section.setdefault(key, {})
            if not isinstance(section, dict):
                raise ConfigError(f"{'.'.join(path)} is within {key}, which is given a value itself.")
        section[path[-1]] = value
    return sections
