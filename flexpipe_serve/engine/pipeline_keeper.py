"""Keeps a pipeline up: brings it up, hears from its stages, and brings it up again when some are lost."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from flexpipe_serve.engine.stage_placer import StagePlacer
from flexpipe_serve.engine.step_loop import StepLoop
from flexpipe_serve.errors import EngineUnavailableError
from flexpipe_serve.pipeline.layout import Layout
from flexpipe_serve.pipeline.pipeline import Pipeline
from flexpipe_serve.pipeline.stage_types import StageReport

logger = logging.getLogger(__name__)
_RETRY_S = 2.0
"""Between attempts to bring a lost pipeline back."""


class PipelineKeeper:
    """Methods are called by one thread at a time.

    Args:
        control: where that thread takes its work.
        changing: held while the pipeline's memory changes.
        stopping: set when the engine ends.
        sign_of_life_s: interval in which stages hear from the Router.
        on_heard: called, in a thread of its own, when all stages have told how they are.
        note: keeps an event, its kind and a message.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        loop: StepLoop,
        placer: StagePlacer,
        *,
        control: ThreadPoolExecutor,
        changing: threading.Lock,
        stopping: threading.Event,
        sign_of_life_s: float,
        on_heard: Callable[[], None],
        note: Callable[[str, str], None],
    ) -> None:
        self._pipeline = pipeline
        self._loop = loop
        self._placer = placer
        self._control = control
        self._changing = changing
        self._stopping = stopping
        self._sign_of_life_s = sign_of_life_s
        self._on_heard = on_heard
        self._note = note
        self._heartbeat = threading.Thread(target=self._speak_to_stages, name="flexpipe-heartbeat", daemon=True)
        self.reports: dict[str, StageReport] = {}
        """The latest, by stage."""
        self.unavailable: str | None = "the pipeline has not started."
        """Why no request could be served now; None where one could."""

    def start_heartbeat(self) -> None:
        """Speak to the stages from now on; a second time it does nothing. From any thread."""
        if not self._heartbeat.is_alive():
            self._heartbeat.start()

    def refresh(self) -> None:
        """Ask all stages how they are.

        Raises:
            EngineUnavailableError: a stage does not answer; if it is lost, its watch call tells.
        """
        self.reports = self._pipeline.reports()
        self._placer.update(self.reports)

    def bring_up(self, layout: Layout) -> int:
        """Start the layout from nothing but tokens. Returns how many sequences are replayed."""
        with self._changing:
            self._placer.place(layout)
            num_blocks = self._pipeline.start(layout)
            self.refresh()
            num_replayed = self._loop.resume(depth=self._pipeline.depth(layout), num_blocks=num_blocks).result()
        self.unavailable = None
        return num_replayed

    def rebuild_once(self, layout: Layout) -> int:
        """:meth:`bring_up`, beginning with no steps being sent."""
        self.unavailable = "the pipeline is being rebuilt."
        self._loop.pause().result()
        return self.bring_up(layout)

    def rebuild(self, layout: Layout, reason: str) -> None:
        """Bring the pipeline up again, however often it takes; requests wait meanwhile."""
        while not self._stopping.is_set():
            self.unavailable = reason
            try:
                num_replayed = self.rebuild_once(layout)
            except Exception as error:  # process edge: whatever it was, try again with new stages
                logger.exception("the pipeline could not be rebuilt")
                self.unavailable = f"{reason} Bringing the pipeline up failed: {error}"
                self._stopping.wait(_RETRY_S)
                continue
            self._note("rebuilt", f"{layout.num_stages} stages are up again; {num_replayed} sequences are replayed.")
            return

    def _speak_to_stages(self) -> None:
        while not self._stopping.wait(self._sign_of_life_s):
            try:
                self._control.submit(self.refresh).result()
            except EngineUnavailableError as error:
                logger.warning("%s", error)  # a lost stage is noticed by its watch call
                continue
            except RuntimeError:
                return  # stopped meanwhile
            self._on_heard()
