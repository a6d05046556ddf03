"""What commands have in common that ask a running server."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable

from rich.console import Console

from flexpipe_serve.cli_console import run_command
from flexpipe_serve.handle import Handle, connect


def server_arguments() -> argparse.ArgumentParser:
    """The arguments that name the server: a parent for the command's parser."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument(
        "--url", type=_url, default="http://127.0.0.1:8000", help="of the server (default: %(default)s)"
    )
    parser.add_argument(
        "--api-key", default=os.environ.get("FLEXPIPE_API_KEY"), help="if it wants one (default: $FLEXPIPE_API_KEY)"
    )
    return parser


def _url(text: str) -> str:
    return text if "://" in text else f"http://{text}"


def with_handle(command: Callable[[argparse.Namespace, Handle, Console], int]) -> Callable[[argparse.Namespace], int]:
    """The command with a handle of the server and a console, see run_command.

    Returns:
        What to call with the arguments: the exit status.
    """

    def run(args: argparse.Namespace) -> int:
        def with_server(console: Console) -> int:
            with connect(args.url, api_key=args.api_key) as handle:
                return command(args, handle, console)

        return run_command(with_server)

    return run
