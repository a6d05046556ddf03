"""Where commands print, and how they show errors that a user can cause."""

from __future__ import annotations

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

_EXPECTED = (
    ConfigError, EngineUnavailableError, InvalidRequestError, RefactorBusyError, RefactorRefusedError, OSError
)  # fmt: skip
_PLAIN_WIDTH = 200
"""Of tables that go to a file or a pipe."""
_INTERRUPTED = 130


def run_command(command: Callable[[Console], int]) -> int:
    """Call ``command`` with a console; of an error that a user can cause a line is shown.

    Returns:
        Its exit status; 1 after such an error, 130 after Ctrl-C.
    """
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=_PLAIN_WIDTH)
    try:
        return command(console)
    except _EXPECTED as error:
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"[red]error:[/red] {escape(str(error))}")
        return 1
    except KeyboardInterrupt:
        return _INTERRUPTED
