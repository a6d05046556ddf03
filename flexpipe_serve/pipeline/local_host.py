"""Stages as threads of this process: for tests, and to measure a pipeline against its layers in one process."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import TypeVar

from flexpipe_serve.pipeline.stage import Stage
from flexpipe_serve.pipeline.stage_types import Assignment, StageHandle, StageReport, StageSetup
from flexpipe_serve.placement.nodes import one_node_topology
from flexpipe_serve.placement.topology import DeviceKind, Topology

_T = TypeVar("_T")


class LocalStageHost:
    """Hosts stages in threads."""

    node = "local"

    def __init__(self) -> None:
        self._alive: dict[str, LocalStage] = {}
        # One at a time: building a model without memory for its weights patches torch for the whole process.
        self._launching = threading.Lock()

    def launch(self, setup: StageSetup, *, node: str | None = None) -> StageHandle:
        assert node in (None, self.node)
        with self._launching:
            stage = self._alive.get(setup.name)
            if stage is None or stage.is_over or stage.core.setup != setup:
                stage = self._alive[setup.name] = LocalStage(Stage(setup, node=self.node))
            return stage

    def topology(self, *, kind: DeviceKind) -> Topology:
        return one_node_topology(self.node, kind=kind)

    def read_drained(self) -> dict[str, float]:
        return {}

    def write_drained(self, deadlines: Mapping[str, float], /) -> None:
        """There is no later Router."""


class LocalStage:
    """A stage in a thread, and its handle. Each call has a thread of its own."""

    def __init__(self, core: Stage) -> None:
        self.name = core.setup.name
        self.core = core
        self._over: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, name=self.name, daemon=True)
        self._thread.start()

    @property
    def is_over(self) -> bool:
        """True once the stage has ended."""
        return self._over.done()

    def report(self) -> Future[StageReport]:
        return self._call(self.core.report)

    def prepare(self, assignment: Assignment, *, num_blocks: int, fresh: bool) -> Future[StageReport]:
        return self._call(lambda: self.core.prepare(assignment, num_blocks=num_blocks, fresh=fresh))

    def resize_kv(self, num_blocks: int, *, fresh: bool = False) -> Future[None]:
        return self._call(lambda: self.core.resize_kv(num_blocks, fresh=fresh))

    def wait_copied(self, epoch: int, *, through_step: int, timeout_s: float) -> Future[None]:
        return self._call(lambda: self.core.wait_copied(epoch, through_step=through_step, timeout_s=timeout_s))

    def release(self, epoch: int) -> Future[StageReport]:
        return self._call(lambda: self.core.release(epoch))

    def watch(self) -> Future[None]:
        return self._over

    def stop(self) -> None:
        self.core.close()
        self._thread.join()

    def _call(self, function: Callable[[], _T]) -> Future[_T]:
        answer: Future[_T] = Future()

        def run() -> None:
            try:
                answer.set_result(function())
            except Exception as error:  # thread edge: the caller gets it
                answer.set_exception(error)

        threading.Thread(target=run, name=f"{self.name}-control", daemon=True).start()
        return answer

    def _run(self) -> None:
        self.core.run()
        self._over.set_result(None)
