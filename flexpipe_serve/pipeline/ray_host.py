"""Stages as Ray actors: named, detached, adopted by the next Router when theirs is gone."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from concurrent.futures import Future
from typing import Any

import ray

from flexpipe_serve.errors import EngineUnavailableError
from flexpipe_serve.pipeline.stage_types import Assignment, StageHandle, StageReport, StageSetup

NAMESPACE = "flexpipe"
_STOP_S = 5.0
_EXIT_GRACE_S = 3.0


@ray.remote(num_cpus=0, max_restarts=0, concurrency_groups={"watch": 64})
class StageActor:
    """A thin shell around a stage's core; ends itself when no Router speaks to it any more."""

    def __init__(self, setup: StageSetup) -> None:
        from flexpipe_serve.pipeline.stage import Stage  # torch: imported where the stage lives, not in the Router

        node = ray.get_runtime_context().get_node_id()
        self._stage = Stage(setup, node=node)
        self._loop = threading.Thread(target=self._stage.run, name=setup.name, daemon=True)
        self._loop.start()
        self._last_contact = time.monotonic()
        self._over = threading.Event()
        threading.Thread(target=self._end_when_orphaned, args=(setup.orphan_timeout_s,), daemon=True).start()

    def report(self) -> StageReport:
        """The stage's state; being asked counts as a sign of life of the Router."""
        self._last_contact = time.monotonic()
        return self._stage.report()

    def configure(self, assignment: Assignment) -> StageReport:
        """See StageHandle.configure."""
        report = self._stage.configure(assignment)
        self._last_contact = time.monotonic()
        return report

    def commit_kv(self, num_blocks: int) -> None:
        """See StageHandle.commit_kv."""
        self._stage.commit_kv(num_blocks)

    @ray.method(concurrency_group="watch")  # type: ignore[untyped-decorator]
    def watch(self) -> None:
        """Returns only when the stage ends; a killed actor fails the call within milliseconds."""
        self._over.wait()

    def close(self) -> None:
        """Let go of shared memory and sockets; the process is killed afterwards."""
        self._stage.close()
        self._loop.join(_STOP_S)
        self._over.set()

    def _end_when_orphaned(self, timeout_s: float) -> None:
        while not self._over.wait(timeout_s / 10):
            if time.monotonic() - self._last_contact > timeout_s:
                self.close()
                time.sleep(_EXIT_GRACE_S)  # lets a pending watch() answer before the process goes
                os._exit(0)


class RayStageHost:
    """Hosts stages as Ray actors.

    Args:
        app: name of the Serve application; part of the actors' names.
    """

    def __init__(self, app: str) -> None:
        self._app = app
        self.node = ray.get_runtime_context().get_node_id()

    def launch(self, setup: StageSetup) -> StageHandle:
        name = f"{self._app}:{setup.name}"
        with contextlib.suppress(ValueError):
            actor = ray.get_actor(name, namespace=NAMESPACE)
            stage = RayStage(setup.name, actor)
            if stage.fits(setup):
                return stage
            stage.stop()
        actor = StageActor.options(  # type: ignore[attr-defined]
            name=name,
            namespace=NAMESPACE,
            lifetime="detached",
            # Stages may share a GPU; memory budgets keep them apart.
            num_gpus=0.01 if setup.device == "cuda" else 0,
            # Left alone, Ray gives an actor one thread; each step says how many it may use.
            runtime_env={"env_vars": {"OMP_NUM_THREADS": str(os.cpu_count() or 1)}},
        ).remote(setup)
        return RayStage(setup.name, actor)


class RayStage:
    """Handle of a stage actor."""

    def __init__(self, name: str, actor: Any) -> None:
        self.name = name
        self._actor = actor

    def fits(self, setup: StageSetup) -> bool:
        """Whether an actor found by name was started for the same model and settings."""
        try:
            report = ray.get(self._actor.report.remote(), timeout=_STOP_S)
        except (ray.exceptions.RayError, TimeoutError):
            return False
        return bool(report.setup == setup)

    def report(self) -> Future[StageReport]:
        return self._future(self._actor.report.remote())

    def configure(self, assignment: Assignment) -> Future[StageReport]:
        return self._future(self._actor.configure.remote(assignment))

    def commit_kv(self, num_blocks: int) -> Future[None]:
        return self._future(self._actor.commit_kv.remote(num_blocks))

    def watch(self) -> Future[None]:
        return self._future(self._actor.watch.remote())

    def stop(self) -> None:
        with contextlib.suppress(ray.exceptions.RayError, TimeoutError):
            ray.get(self._actor.close.remote(), timeout=_STOP_S)
        ray.kill(self._actor)

    def _future(self, ref: Any) -> Future[Any]:
        """The call's future, with Ray's errors turned into ours."""
        answer: Future[Any] = Future()

        def finish(done: Future[Any]) -> None:
            error = done.exception()
            if error is None:
                answer.set_result(done.result())
            elif isinstance(error, ray.exceptions.RayTaskError):
                answer.set_exception(error.cause)
            else:
                answer.set_exception(EngineUnavailableError(f"stage {self.name!r} is lost: {error}"))

        ref.future().add_done_callback(finish)
        return answer
