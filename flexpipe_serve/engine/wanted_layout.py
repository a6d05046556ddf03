"""The layout that the configuration asks for: reached by a live refactoring in its turn; the latest wish counts."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

from flexpipe_serve.errors import ConfigError, EngineUnavailableError, RefactorBusyError, RefactorRefusedError
from flexpipe_serve.pipeline.layout import Layout
from flexpipe_serve.pipeline.pipeline import Pipeline
from flexpipe_serve.refactor.manager import RefactorManager
from flexpipe_serve.refactor.record import RefactorRecord, RefactorRequest


@dataclass
class _Wish:
    layout: Layout
    future: Future[None]
    refactoring_id: str | None = field(default=None)
    """Of the attempt to get it."""


class WantedLayout:
    """Belongs to the engine's control thread.

    Args:
        start: starts a refactoring.
    """

    def __init__(
        self, pipeline: Pipeline, refactorings: RefactorManager, *, start: Callable[[RefactorRequest], RefactorRecord]
    ) -> None:
        self._pipeline = pipeline
        self._refactorings = refactorings
        self._start = start
        self._wish: _Wish | None = None

    def want(self, layout: Layout, future: Future[None]) -> None:
        """Ask for a layout with these boundaries, instead of one that still waits for its turn.

        Args:
            future: ends when it is in force; fails with ConfigError where it cannot be had.
        """
        former, self._wish = self._wish, _Wish(layout, future)
        if former is not None:
            former.future.set_exception(ConfigError("another layout was asked for meanwhile."))
        self.pursue()

    def pursue(self) -> None:
        """Start the refactoring, when it is its turn. To be called again whenever that may have changed."""
        wish, layout = self._wish, self._pipeline.layout
        if wish is None or layout is None or self._refactorings.is_running or not self._pipeline.is_complete:
            return
        if wish.layout.boundaries == layout.boundaries:
            self._wish = None
            wish.future.set_result(None)
            return
        try:
            if wish.refactoring_id is not None:  # it was tried
                record = self._refactorings.get(wish.refactoring_id)
                raise RefactorRefusedError(f"the layout could not be changed: {record.error if record else ''}")
            request = RefactorRequest(boundaries=wish.layout.boundaries, reason="configuration")
            wish.refactoring_id = self._start(request).id
        except RefactorBusyError:
            return
        except (RefactorRefusedError, EngineUnavailableError) as error:
            self._wish = None
            wish.future.set_exception(ConfigError(str(error)))
