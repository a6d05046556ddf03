"""Stages as Ray actors: named, detached, adopted by the next Router when theirs is gone."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from typing import Any

import msgspec
import ray
from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_put
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from flexpipe_serve.errors import EngineUnavailableError
from flexpipe_serve.pipeline.background import in_background
from flexpipe_serve.pipeline.compute import pin_process
from flexpipe_serve.pipeline.stage_types import Assignment, StageHandle, StageReport, StageSetup
from flexpipe_serve.placement.ray_topology import read_topology
from flexpipe_serve.placement.topology import DeviceKind, Topology

NAMESPACE = "flexpipe"
_STOP_S = 5.0
_EXIT_GRACE_S = 3.0


@ray.remote(
    num_cpus=0,
    max_restarts=0,
    # Each kind of call has threads of its own, so that none waits for another: loading takes seconds.
    concurrency_groups={"state": 2, "change": 4, "copies": 16, "watch": 64},
)
class StageActor:
    """A thin shell around a stage's core; ends itself when no Router speaks to it any more."""

    def __init__(self, setup: StageSetup) -> None:
        pin_process(setup.cores)  # first: threads that start later stay on the same cores
        in_background(_import_stage)  # torch: imported where the stage lives, not in the Router
        from flexpipe_serve.pipeline.stage import Stage

        node = ray.get_runtime_context().get_node_id()
        self._stage = Stage(setup, node=node)
        self._loop = threading.Thread(target=self._stage.run, name=setup.name, daemon=True)
        self._loop.start()
        self._lock = threading.Lock()
        self._num_calls = 0
        self._last_contact = time.monotonic()
        self._over = threading.Event()
        threading.Thread(target=self._end_when_orphaned, args=(setup.orphan_timeout_s,), daemon=True).start()

    @ray.method(concurrency_group="state")  # type: ignore[untyped-decorator]
    def report(self) -> StageReport:
        """The stage's state."""
        with self._contact():
            return self._stage.report()

    @ray.method(concurrency_group="change")  # type: ignore[untyped-decorator]
    def prepare(self, assignment: Assignment, *, num_blocks: int, fresh: bool) -> StageReport:
        """See StageHandle.prepare."""
        with self._contact():
            return self._stage.prepare(assignment, num_blocks=num_blocks, fresh=fresh)

    @ray.method(concurrency_group="change")  # type: ignore[untyped-decorator]
    def resize_kv(self, num_blocks: int, *, fresh: bool) -> None:
        """See StageHandle.resize_kv."""
        with self._contact():
            self._stage.resize_kv(num_blocks, fresh=fresh)

    @ray.method(concurrency_group="change")  # type: ignore[untyped-decorator]
    def release(self, epoch: int) -> StageReport:
        """See StageHandle.release."""
        with self._contact():
            return self._stage.release(epoch)

    @ray.method(concurrency_group="copies")  # type: ignore[untyped-decorator]
    def wait_copied(self, epoch: int, *, through_step: int, timeout_s: float) -> None:
        """See StageHandle.wait_copied."""
        with self._contact():
            self._stage.wait_copied(epoch, through_step=through_step, timeout_s=timeout_s)

    @ray.method(concurrency_group="watch")  # type: ignore[untyped-decorator]
    def watch(self) -> None:
        """Returns only when the stage ends; a killed actor fails the call within milliseconds."""
        self._over.wait()

    def close(self) -> None:
        """Let go of shared memory and sockets; the process is killed afterwards."""
        self._stage.close()
        self._loop.join(_STOP_S)
        self._over.set()

    @contextlib.contextmanager
    def _contact(self) -> Iterator[None]:
        """Any call is a sign of life of the Router, for as long as it takes."""
        with self._lock:
            self._num_calls += 1
        try:
            yield
        finally:
            with self._lock:
                self._num_calls -= 1
                self._last_contact = time.monotonic()

    def _end_when_orphaned(self, timeout_s: float) -> None:
        while not self._over.wait(timeout_s / 10):
            with self._lock:
                is_orphan = not self._num_calls and time.monotonic() - self._last_contact > timeout_s
            if is_orphan:
                self.close()
                time.sleep(_EXIT_GRACE_S)  # lets a pending watch() answer before the process goes
                os._exit(0)


def _import_stage() -> None:
    import flexpipe_serve.pipeline.stage  # noqa: F401 - torch takes seconds


class RayStageHost:
    """Hosts stages as Ray actors.

    Args:
        app: name of the Serve application; part of the actors' names.
    """

    def __init__(self, app: str) -> None:
        self._app = app
        self.node = ray.get_runtime_context().get_node_id()

    def launch(self, setup: StageSetup, *, node: str | None = None) -> StageHandle:
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
            scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False) if node else "SPREAD",
            # Stages may share a GPU; memory budgets keep them apart.
            num_gpus=0.01 if setup.device == "cuda" else 0,
            # Left alone, Ray gives an actor one thread; each step says how many it may use.
            runtime_env={"env_vars": {"OMP_NUM_THREADS": str(os.cpu_count() or 1)}},
        ).remote(setup)
        return RayStage(setup.name, actor)

    def topology(self, *, kind: DeviceKind) -> Topology:
        return read_topology(kind=kind)

    def read_drained(self) -> dict[str, float]:
        kept = _internal_kv_get(self._drained_key)
        return msgspec.json.decode(kept, type=dict[str, float]) if kept else {}

    def write_drained(self, deadlines: Mapping[str, float], /) -> None:
        _internal_kv_put(self._drained_key, msgspec.json.encode(deadlines), overwrite=True)

    @property
    def _drained_key(self) -> bytes:
        return f"flexpipe:{self._app}:drained".encode()


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

    def prepare(self, assignment: Assignment, *, num_blocks: int, fresh: bool) -> Future[StageReport]:
        return self._future(self._actor.prepare.remote(assignment, num_blocks=num_blocks, fresh=fresh))

    def resize_kv(self, num_blocks: int, *, fresh: bool = False) -> Future[None]:
        return self._future(self._actor.resize_kv.remote(num_blocks, fresh=fresh))

    def wait_copied(self, epoch: int, *, through_step: int, timeout_s: float) -> Future[None]:
        return self._future(self._actor.wait_copied.remote(epoch, through_step=through_step, timeout_s=timeout_s))

    def release(self, epoch: int) -> Future[StageReport]:
        return self._future(self._actor.release.remote(epoch))

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
