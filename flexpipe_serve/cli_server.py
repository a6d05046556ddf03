"""What commands have in common that ask a running server."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable

from rich.console import Console
from rich.markup import escape

from flexpipe_serve.errors import (
    ConfigError,
    EngineUnavailableError,
    InvalidRequestError,
    RefactorBusyError,
    RefactorRefusedError,
)
from flexpipe_serve.handle import Handle, connect

_EXPECTED = (ConfigError, EngineUnavailableError, InvalidRequestError, RefactorBusyError, RefactorRefusedError)
_PLAIN_WIDTH = 200
"""Of tables that go to a file or a pipe."""


def server_arguments() -> argparse.ArgumentParser:
    """The arguments that name the server: a parent for the command's parser."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of the server (default: %(default)s)")
    parser.add_argument(
        "--api-key", default=os.environ.get("FLEXPIPE_API_KEY"), help="if it wants one (default: $FLEXPIPE_API_KEY)"
    )
    return parser


def with_handle(command: Callable[[argparse.Namespace, Handle, Console], int]) -> Callable[[argparse.Namespace], int]:
    """The command with a handle of the server and a console; errors that a user can cause are shown in a line.

    Returns:
        What to call with the arguments: the exit status.
    """

    def run(args: argparse.Namespace) -> int:
        console = Console(highlight=False)
        if not console.is_terminal:
            console = Console(highlight=False, width=_PLAIN_WIDTH)
        try:
            with connect(args.url, api_key=args.api_key) as handle:
                return command(args, handle, console)
        except _EXPECTED as error:
            Console(stderr=True, highlight=False, soft_wrap=True).print(f"[red]error:[/red] {escape(str(error))}")
            return 1

    return run
