"""Stages as threads of this process: for tests, and to measure a pipeline against its layers in one process."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from flexpipe_serve.pipeline.stage import Stage
from flexpipe_serve.pipeline.stage_types import Assignment, StageHandle, StageReport, StageSetup

_T = TypeVar("_T")


class LocalStageHost:
    """Hosts stages in threads. Control calls of all of them run one after the other: building a model without
    memory for its weights patches torch for the whole process."""

    node = "local"

    def __init__(self) -> None:
        self._control = ThreadPoolExecutor(1, thread_name_prefix="stage-control")
        self._alive: dict[str, LocalStage] = {}

    def launch(self, setup: StageSetup) -> StageHandle:
        stage = self._alive.get(setup.name)
        if stage is None or stage.is_over or stage.core.setup != setup:
            stage = self._alive[setup.name] = LocalStage(Stage(setup, node=self.node), self._control)
        return stage


class LocalStage:
    """A stage in a thread, and its handle."""

    def __init__(self, core: Stage, control: ThreadPoolExecutor) -> None:
        self.name = core.setup.name
        self.core = core
        self._control = control
        self._over: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, name=self.name, daemon=True)
        self._thread.start()

    @property
    def is_over(self) -> bool:
        """True once the stage has ended."""
        return self._over.done()

    def report(self) -> Future[StageReport]:
        return self._submit(self.core.report)

    def configure(self, assignment: Assignment) -> Future[StageReport]:
        return self._submit(lambda: self.core.configure(assignment))

    def commit_kv(self, num_blocks: int) -> Future[None]:
        return self._submit(lambda: self.core.commit_kv(num_blocks))

    def watch(self) -> Future[None]:
        return self._over

    def stop(self) -> None:
        self.core.close()
        self._thread.join()

    def _submit(self, call: Callable[[], _T]) -> Future[_T]:
        return self._control.submit(call)

    def _run(self) -> None:
        self.core.run()
        self._over.set_result(None)
