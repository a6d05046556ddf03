"""The frame of benchmarks that start servers: a console, an interrupt that ends them in order, errors in a line."""

import argparse
import asyncio
import contextlib
from collections.abc import Callable
from typing import Protocol

from rich.console import Console
from rich.markup import escape

from flexpipe_serve.errors import ConfigError, EngineUnavailableError, InvalidRequestError, RefactorRefusedError
from flexpipe_serve.interrupts import interruptible

_PLAIN_WIDTH = 200
"""A log file need not fold tables to 80 columns."""


class Experiment(Protocol):
    """One run of a benchmark."""

    @property
    def is_good(self) -> bool:
        """Whether all that was asked for was done, and nothing failed."""
        ...

    async def run(self) -> None: ...

    def report(self) -> None:
        """Print and write what there is, also after an interrupt or an error."""
        ...


def run_experiment(make: Callable[[argparse.Namespace, Console], Experiment], args: argparse.Namespace) -> int:
    """Make an experiment and run it.

    Returns:
        0; 1 if it is not good; 2 if it cannot be done.
    """
    console = Console(soft_wrap=True)
    if not console.is_terminal:
        console.width = _PLAIN_WIDTH
    try:
        experiment = make(args, console)
        with interruptible():
            try:
                with contextlib.suppress(KeyboardInterrupt):
                    asyncio.run(experiment.run())
            finally:
                experiment.report()
        return int(not experiment.is_good)
    except (ConfigError, EngineUnavailableError, InvalidRequestError, RefactorRefusedError) as error:
        console.print(f"[red]error:[/red] {escape(str(error))}")
        return 2
