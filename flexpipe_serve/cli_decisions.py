"""``flexpipe decisions``: what the planner decided lately."""

from __future__ import annotations

import argparse
import json

from rich.console import Console

from flexpipe_serve.cli_plan_views import decisions_table
from flexpipe_serve.cli_server import server_arguments, with_handle
from flexpipe_serve.handle import Handle
from flexpipe_serve.planner.wire import to_wire


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``decisions`` to the parser of ``flexpipe``."""
    parser = commands.add_parser(
        "decisions",
        parents=[server_arguments()],
        help="what the planner decided lately, also to stay (none while its mode is off)",
    )
    parser.add_argument("--last", type=int, default=20, metavar="N", help="only the latest (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="with demand, candidates and all figures")
    parser.set_defaults(run=with_handle(_decisions))


def _decisions(args: argparse.Namespace, handle: Handle, console: Console) -> int:
    latest = handle.decisions()[-max(1, args.last) :]
    if args.json:
        print(json.dumps([to_wire(decision) for decision in latest], indent=2))
    else:
        console.print(decisions_table(latest))
    return 0
