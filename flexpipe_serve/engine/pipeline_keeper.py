"""Keeps a pipeline up: brings it up, hears from its stages, and brings it up again when some are lost.

Here alone it is decided whether requests can be served now.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Executor, wait

from flexpipe_serve.engine.stage_placer import StagePlacer
from flexpipe_serve.engine.step_loop import StepLoop
from flexpipe_serve.errors import EngineUnavailableError
from flexpipe_serve.pipeline.layout import Layout
from flexpipe_serve.pipeline.pipeline import Pipeline
from flexpipe_serve.pipeline.stage_types import StageReport
from flexpipe_serve.refactor.commands import Finish
from flexpipe_serve.refactor.manager import RefactorManager

logger = logging.getLogger(__name__)
_RETRY_S = 2.0
"""Between attempts to bring a lost pipeline back."""


class PipelineKeeper:
    """Any thread may ask; what changes the pipeline is done by one thread at a time.

    Args:
        control: runs what changes the pipeline, one call at a time.
        changing: held while the pipeline's memory changes.
        sign_of_life_s: interval in which stages hear from the Router.
        on_heard: called, in a thread of its own, when all stages have told how they are.
        on_down: called in ``control`` when the pipeline cannot serve for a while; requests may be handed over.
        on_settled: called in ``control`` when it is up again, or a refactoring is over.
        note: keeps an event, its kind and a message.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        loop: StepLoop,
        refactorings: RefactorManager,
        placer: StagePlacer,
        *,
        control: Executor,
        changing: threading.Lock,
        sign_of_life_s: float,
        on_heard: Callable[[], None],
        on_down: Callable[[], None],
        on_settled: Callable[[], None],
        note: Callable[[str, str], None],
    ) -> None:
        self._pipeline = pipeline
        self._loop = loop
        self._refactorings = refactorings
        self._placer = placer
        self._control = control
        self._changing = changing
        self._sign_of_life_s = sign_of_life_s
        self._on_heard = on_heard
        self._on_down = on_down
        self._on_settled = on_settled
        self._note = note
        self._stopping = threading.Event()
        self._heartbeat = threading.Thread(target=self._speak_to_stages, name="flexpipe-heartbeat", daemon=True)
        self._unavailable: str | None = "the pipeline has not started."
        self.reports: dict[str, StageReport] = {}
        """The latest, by stage."""

    @property
    def unavailable(self) -> str | None:
        """Why no request could be served now; None where one could."""
        return "the server is shutting down." if self.is_stopping else self._unavailable

    @property
    def is_stopping(self) -> bool:
        """Whether :meth:`stop` was called."""
        return self._stopping.is_set()

    def stop(self) -> None:
        """Bring nothing up any more, and speak to no stage."""
        self._stopping.set()

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
        self._unavailable = None
        return num_replayed

    def rebuild_once(self, layout: Layout) -> int:
        """:meth:`bring_up`, beginning with no steps being sent."""
        self._unavailable = "the pipeline is being rebuilt."
        self._loop.pause().result()
        return self.bring_up(layout)

    def on_stage_lost(self, name: str, reason: str) -> None:
        """A stage is gone: whoever changes the pipeline now sees to it, or else it is replaced."""
        if self.is_stopping:
            return
        logger.error("stage %s is lost: %s", name, reason)
        self._note("stage_lost", f"stage {name!r} was lost: {reason}")
        self._pipeline.forget(name)
        if self._refactorings.on_stage_lost(name, reason):
            return
        if self._pipeline.layout is not None:  # else its start is under way and fails by itself
            self._control.submit(self._replace_lost, f"stage {name!r} was lost and is being replaced.")

    def on_refactored(self, finish: Finish) -> None:
        """A refactoring is over."""
        if not self.is_stopping:
            self._control.submit(self._settle, finish)

    # ------------------------------------------------------------------ in the control thread

    def _replace_lost(self, reason: str) -> None:
        # The layout may have changed since the loss, and that may have replaced the stage.
        layout = self._pipeline.layout
        if layout is None or self._refactorings.is_running:
            return
        if not self._pipeline.is_complete:
            self._rebuild(layout, reason)
        self._refactorings.fill_pool()
        self._on_settled()

    def _settle(self, finish: Finish) -> None:
        if self._refactorings.is_running:
            return
        if not finish.is_rebuilt or not self._pipeline.is_complete:
            self._rebuild(finish.layout, "a stage was lost during a refactoring and is being replaced.")
        self._refactorings.fill_pool()
        with contextlib.suppress(EngineUnavailableError):  # a lost stage is noticed by its watch call
            self.refresh()  # or the status would not know the new ones yet
        self._on_settled()

    def _rebuild(self, layout: Layout, reason: str) -> None:
        """Bring the pipeline up again, however often it takes; requests wait meanwhile, or are handed over."""
        self._unavailable = reason
        self._on_down()
        while not self.is_stopping:
            try:
                num_replayed = self.rebuild_once(layout)
            except Exception as error:  # process edge: whatever it was, try again with new stages
                logger.exception("the pipeline could not be rebuilt")
                self._unavailable = f"{reason} Bringing the pipeline up failed: {error}"
                self._stopping.wait(_RETRY_S)
                continue
            self._note("rebuilt", f"{layout.num_stages} stages are up again; {num_replayed} sequences are replayed.")
            return

    # ------------------------------------------------------------------ the heartbeat's thread

    def _speak_to_stages(self) -> None:
        while not self._stopping.wait(self._sign_of_life_s):
            try:
                refreshed = self._control.submit(self.refresh)
                while not wait([refreshed], self._sign_of_life_s).done:
                    # Others are being brought up, and those that are ready must not take themselves for orphans.
                    self._pipeline.reports()
                refreshed.result()
            except EngineUnavailableError as error:
                logger.warning("%s", error)  # a lost stage is noticed by its watch call
                continue
            except RuntimeError:
                return  # stopped meanwhile
            self._on_heard()
