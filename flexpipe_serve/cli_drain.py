"""``flexpipe drain``: empty a node before it goes."""

from __future__ import annotations

import argparse
import time

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from flexpipe_serve.cli_server import server_arguments, with_handle
from flexpipe_serve.handle import Handle
from flexpipe_serve.placement.drain import DrainRecord, DrainState
from flexpipe_serve.placement.nodes import short_name

_POLL_S = 0.5
_COLOURS = {DrainState.DRAINING: "yellow", DrainState.EMPTY: "green", DrainState.LOST: "red"}


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``drain`` to the parser of ``flexpipe``."""
    parser = commands.add_parser(
        "drain",
        parents=[server_arguments()],
        help="empty a node before it goes, while the pipeline serves, and keep it empty",
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("node", nargs="?", metavar="NODE", help="its id, the beginning of that, or its address")
    what.add_argument("--list", action="store_true", help="the nodes that are being emptied or kept empty")
    parser.add_argument(
        "--deadline", type=float, default=60.0, metavar="S", help="seconds until it may be gone (default: %(default)g)"
    )
    parser.add_argument("--no-wait", action="store_true", help="return when it has begun")
    parser.add_argument("--undo", action="store_true", help="let stages be launched on the node again")
    parser.set_defaults(run=with_handle(_drain))


def _drain(args: argparse.Namespace, handle: Handle, console: Console) -> int:
    if args.list:
        console.print(_table(handle.drains()))
        return 0
    if args.undo:
        handle.undrain(_known(args.node, handle))
        console.print(f"stages may be launched on node {escape(args.node)} again")
        return 0
    record = handle.drain(args.node, deadline_s=args.deadline)
    _show(record, console)
    while not (record.is_over or args.no_wait):
        time.sleep(_POLL_S)
        now = next((found for found in handle.drains() if found.node == record.node), None)
        if now is None:
            console.print("[yellow]somebody has taken it back[/yellow]")
            return 1
        if now.message != record.message:
            _show(now, console)
        record = now
    return 1 if record.state is DrainState.LOST else 0


def _known(text: str, handle: Handle) -> str:
    """The id of a drained node, of which ``text`` may be the beginning."""
    found = [record.node for record in handle.drains() if record.node.startswith(text)]
    return found[0] if len(found) == 1 else text


def _show(record: DrainRecord, console: Console) -> None:
    colour = _COLOURS[record.state]
    console.print(
        f"{record.seconds:6.1f} s  node {escape(short_name(record.node))} [{colour}]{record.state}[/]:"
        f" {escape(record.message)}"
    )


def _table(records: list[DrainRecord]) -> Table:
    table = Table("node", "state", "seconds", "stages", "why", "how it stands", box=None, pad_edge=False)
    for record in records:
        table.add_row(
            escape(short_name(record.node)),
            f"[{_COLOURS[record.state]}]{record.state}[/]",
            f"{record.seconds:.1f}",
            escape(", ".join(record.stages)) or "-",
            escape(record.reason),
            escape(record.message),
        )
    return table
