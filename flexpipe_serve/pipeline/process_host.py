"""Stages as plain processes: where Ray is missing, and to measure what Ray adds."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import socket
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any

from flexpipe_serve.errors import EngineUnavailableError
from flexpipe_serve.pipeline.stage_types import Assignment, StageHandle, StageReport, StageSetup

_STOP_S = 5.0


class ProcessStageHost:
    """Hosts stages in processes of their own, children of this one."""

    def __init__(self) -> None:
        self.node = socket.gethostname()

    def launch(self, setup: StageSetup) -> StageHandle:
        return ProcessStage(setup)


class ProcessStage:
    """A stage in a child process, and its handle. Calls go over a pipe, one at a time."""

    def __init__(self, setup: StageSetup) -> None:
        self.name = setup.name
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(setup, theirs), name=self.name, daemon=True)
        self._process.start()
        theirs.close()
        self.pid = self._process.pid
        self._executor = ThreadPoolExecutor(1, thread_name_prefix=f"{self.name}-control")
        self._over: Future[None] = Future()
        threading.Thread(target=self._wait, name=f"{self.name}-watch", daemon=True).start()

    def report(self) -> Future[StageReport]:
        return self._submit("report")

    def configure(self, assignment: Assignment) -> Future[StageReport]:
        return self._submit("configure", assignment)

    def commit_kv(self, num_blocks: int) -> Future[None]:
        return self._submit("commit_kv", num_blocks)

    def watch(self) -> Future[None]:
        return self._over

    def stop(self) -> None:
        with contextlib.suppress(EngineUnavailableError, TimeoutError):
            self._submit("close").result(_STOP_S)
        self._process.join(_STOP_S)
        self._process.kill()
        self._executor.shutdown()

    def _submit(self, method: str, *args: Any) -> Future[Any]:
        return self._executor.submit(self._call, method, *args)

    def _call(self, method: str, *args: Any) -> Any:
        try:
            self._pipe.send((method, args))
            answer = self._pipe.recv()
        except (EOFError, OSError) as error:
            raise EngineUnavailableError(f"stage {self.name!r} is gone.") from error
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _wait(self) -> None:
        self._process.join()
        self._over.set_exception(EngineUnavailableError(f"stage {self.name!r} ended ({self._process.exitcode})."))


def _serve(setup: StageSetup, pipe: Connection) -> None:
    """Main function of the child: the data loop in a thread, control calls here; ends when the parent does."""
    from flexpipe_serve.pipeline.stage import Stage

    stage = Stage(setup)
    loop = threading.Thread(target=stage.run, name=setup.name, daemon=True)
    loop.start()
    with contextlib.suppress(EOFError, OSError):
        while True:
            method, args = pipe.recv()
            try:
                answer = getattr(stage, method)(*args)
            except Exception as error:  # process edge: the parent gets it
                answer = error
            pipe.send(answer)
            if method == "close":
                break
    stage.close()
    loop.join(_STOP_S)
    os._exit(0)
