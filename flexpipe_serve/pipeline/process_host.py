"""Stages as plain processes: where Ray is missing, and to measure what Ray adds."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import socket
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from multiprocessing.connection import Connection
from typing import Any

from flexpipe_serve.errors import EngineUnavailableError
from flexpipe_serve.pipeline.background import in_background
from flexpipe_serve.pipeline.compute import pin_process
from flexpipe_serve.pipeline.stage_types import Assignment, StageHandle, StageReport, StageSetup
from flexpipe_serve.placement.nodes import one_node_topology
from flexpipe_serve.placement.topology import DeviceKind, Topology

_STOP_S = 5.0


class ProcessStageHost:
    """Hosts stages in processes of their own, children of this one."""

    def __init__(self) -> None:
        self.node = socket.gethostname()

    def launch(self, setup: StageSetup, *, node: str | None = None) -> StageHandle:
        assert node in (None, self.node)
        return ProcessStage(setup)

    def topology(self, *, kind: DeviceKind) -> Topology:
        return one_node_topology(self.node, kind=kind)

    def read_drained(self) -> dict[str, float]:
        return {}

    def write_drained(self, deadlines: Mapping[str, float], /) -> None:
        """There is no later Router."""


class ProcessStage:
    """A stage in a child process, and its handle. Calls go over a pipe, numbered, and are answered in any order."""

    def __init__(self, setup: StageSetup) -> None:
        self.name = setup.name
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(setup, theirs), name=self.name, daemon=True)
        self._process.start()
        theirs.close()
        self.pid = self._process.pid
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._calls: dict[int, Future[Any]] = {}
        self._is_gone = False
        self._over: Future[None] = Future()
        threading.Thread(target=self._receive, name=f"{self.name}-control", daemon=True).start()
        threading.Thread(target=self._wait, name=f"{self.name}-watch", daemon=True).start()

    def report(self) -> Future[StageReport]:
        return self._call("report")

    def prepare(self, assignment: Assignment, *, num_blocks: int, fresh: bool) -> Future[StageReport]:
        return self._call("prepare", assignment, num_blocks=num_blocks, fresh=fresh)

    def resize_kv(self, num_blocks: int, *, fresh: bool = False) -> Future[None]:
        return self._call("resize_kv", num_blocks, fresh=fresh)

    def wait_copied(self, epoch: int, *, through_step: int, timeout_s: float) -> Future[None]:
        return self._call("wait_copied", epoch, through_step=through_step, timeout_s=timeout_s)

    def release(self, epoch: int) -> Future[StageReport]:
        return self._call("release", epoch)

    def watch(self) -> Future[None]:
        return self._over

    def stop(self) -> None:
        with contextlib.suppress(EngineUnavailableError, TimeoutError):
            self._call("close").result(_STOP_S)
        self._process.join(_STOP_S)
        self._process.kill()

    def _call(self, method: str, *args: Any, **kwargs: Any) -> Future[Any]:
        answer: Future[Any] = Future()
        number = next(self._numbers)
        with self._lock:
            if self._is_gone:
                answer.set_exception(self._gone())
                return answer
            self._calls[number] = answer
            with contextlib.suppress(OSError):  # then the other end is closed, and the receiver fails all calls
                self._pipe.send((number, method, args, kwargs))
        return answer

    def _receive(self) -> None:
        with contextlib.suppress(EOFError, OSError):
            while True:
                number, result, error = self._pipe.recv()
                with self._lock:
                    answer = self._calls.pop(number)
                if error is None:
                    answer.set_result(result)
                else:
                    answer.set_exception(error)
        with self._lock:
            self._is_gone = True
            calls, self._calls = self._calls, {}
        for answer in calls.values():
            answer.set_exception(self._gone())

    def _gone(self) -> EngineUnavailableError:
        return EngineUnavailableError(f"stage {self.name!r} is gone.")

    def _wait(self) -> None:
        self._process.join()
        self._over.set_exception(EngineUnavailableError(f"stage {self.name!r} ended ({self._process.exitcode})."))


def _serve(setup: StageSetup, pipe: Connection) -> None:
    """Main function of the child: the data loop and each control call in threads; ends when the parent does."""
    pin_process(setup.cores)  # first: threads that start later stay on the same cores
    in_background(_import_stage)
    from flexpipe_serve.pipeline.stage import Stage

    stage = Stage(setup)
    loop = threading.Thread(target=stage.run, name=setup.name, daemon=True)
    loop.start()
    answering = threading.Lock()

    def answer(number: int, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        result, error = None, None
        try:
            result = getattr(stage, method)(*args, **kwargs)
        except Exception as raised:  # process edge: the parent gets it
            error = raised
        with answering, contextlib.suppress(OSError):
            pipe.send((number, result, error))

    with contextlib.suppress(EOFError, OSError):
        while True:
            call = pipe.recv()
            if call[1] == "close":
                answer(*call)
                break
            threading.Thread(target=answer, args=call, name=f"{setup.name}-control", daemon=True).start()
    stage.close()
    loop.join(_STOP_S)
    os._exit(0)


def _import_stage() -> None:
    import flexpipe_serve.pipeline.stage  # noqa: F401 - torch takes seconds
