"""Puts the weights that a stage holds into the node's host cache, in the background."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path

from flexpipe_serve.model.stage_model import StageModel
from flexpipe_serve.pipeline.background import gently

logger = logging.getLogger(__name__)


class _ClosedError(Exception):
    """The stage ends."""


class CacheFiller:
    """A thread that fills the cache whenever the stage got new weights.

    Args:
        folder: of the application on this node.
    """

    def __init__(self, model: StageModel, *, folder: Path) -> None:
        self._model = model
        self._folder = folder
        self._is_closed = False
        self._wanted = threading.Event()
        self._thread = threading.Thread(target=self._run, name="flexpipe-host-cache", daemon=True)
        self._thread.start()

    def fill(self) -> None:
        """The stage holds something new."""
        self._wanted.set()

    def close(self) -> None:
        """Give up what is under way, and wait until nothing is written any more."""
        self._is_closed = True
        self._wanted.set()
        self._thread.join()

    def _run(self) -> None:
        while True:
            self._wanted.wait()
            self._wanted.clear()
            try:
                gently(self._fill, folder=self._folder)
            except _ClosedError:
                return
            except Exception:  # thread edge: without the cache, layers come from the checkpoint
                logger.exception("the host cache is not filled")

    def _fill(self, pace: Callable[[], None]) -> None:
        def between() -> None:
            if self._is_closed:
                raise _ClosedError
            pace()

        between()
        self._model.fill_cache(between=between)
