"""A served application from Python: ``flexpipe_serve.connect()``."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from flexpipe_serve.async_handle import AsyncHandle, AsyncRefactorJob
from flexpipe_serve.config import UserConfig
from flexpipe_serve.engine.scale_record import ScaleRecord
from flexpipe_serve.engine.status import Event, ServerStatus
from flexpipe_serve.errors import ConfigError
from flexpipe_serve.loop_thread import LoopThread
from flexpipe_serve.placement.drain import DrainRecord
from flexpipe_serve.planner.types import Decision
from flexpipe_serve.refactor.record import RefactorPlan, RefactorRecord
from flexpipe_serve.transport import HttpTransport, ServeTransport, Transport, connect_to_app


def connect(app: str | None = None, *, api_key: str | None = None, address: str | None = None) -> Handle:
    """A handle of a served application.

    Args:
        app: name of the application in the Ray cluster, by default the only one there; or the server's URL, such as
            ``http://127.0.0.1:8000``.
        api_key: for a URL, where the server wants one.
        address: the Ray cluster's, where this process is not connected to it: by default ``RAY_ADDRESS``, or the one
            on this machine.

    Raises:
        ConfigError: there is no such application.
        EngineUnavailableError: there is no cluster, or it serves nothing.
    """
    if app is not None and app.startswith(("http://", "https://")):
        url = app
        if address is not None:
            raise ConfigError("address is a Ray cluster's; a URL needs none.")
        return Handle(lambda: HttpTransport(url, api_key=api_key))
    if api_key is not None:
        raise ConfigError("api_key is for a URL; through Ray none is asked for.")
    serve_handle = connect_to_app(app, address=address)
    return Handle(lambda: ServeTransport(serve_handle))


class Handle:
    """A served application, from any thread.

    All methods raise EngineUnavailableError where it cannot answer now.
    """

    def __init__(self, make_transport: Callable[[], Transport]) -> None:
        self._make_transport = make_transport
        self._loop = LoopThread()
        self._inner = AsyncHandle(make_transport())

    @functools.cached_property
    def aio(self) -> AsyncHandle:
        """The same for asyncio: of the event loop that uses it first, where it is to be closed."""
        return AsyncHandle(self._make_transport())

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let connections go."""
        self._loop.run(self._inner.close())
        self._loop.stop()

    def status(self) -> ServerStatus:
        """See AsyncHandle.status."""
        return self._loop.run(self._inner.status())

    def plan(self) -> Decision:
        """See AsyncHandle.plan."""
        return self._loop.run(self._inner.plan())

    def decisions(self) -> list[Decision]:
        """See AsyncHandle.decisions."""
        return self._loop.run(self._inner.decisions())

    def refactor(
        self,
        *,
        stages: int | None = None,
        boundaries: Sequence[int] | None = None,
        pipeline: int = 0,
        nodes: Sequence[str] | None = None,
        avoid: Sequence[str] = (),
        mode: str = "live",
        hurry: bool = False,
        dry_run: bool = False,
        resize_kv: bool = True,
        max_bytes_per_s: float | None = None,
        timeout_s: float = 300.0,
        reason: str = "requested",
        wait: bool = False,
    ) -> RefactorJob:
        """See AsyncHandle.refactor."""
        job = self._inner.refactor(
            stages=stages,
            boundaries=boundaries,
            pipeline=pipeline,
            nodes=nodes,
            avoid=avoid,
            mode=mode,
            hurry=hurry,
            dry_run=dry_run,
            resize_kv=resize_kv,
            max_bytes_per_s=max_bytes_per_s,
            timeout_s=timeout_s,
            reason=reason,
            wait=wait,
        )
        return RefactorJob(self._loop, self._loop.run(job))

    def refactoring(self, refactoring_id: str) -> RefactorJob:
        """See AsyncHandle.refactoring."""
        return RefactorJob(self._loop, self._loop.run(self._inner.refactoring(refactoring_id)))

    def refactorings(self) -> list[RefactorRecord]:
        """See AsyncHandle.refactorings."""
        return self._loop.run(self._inner.refactorings())

    def scale(
        self,
        *,
        pipelines: int | None = None,
        layouts: Sequence[int | Sequence[int]] | None = None,
        reason: str = "requested",
    ) -> ScaleRecord:
        """See AsyncHandle.scale."""
        return self._loop.run(self._inner.scale(pipelines=pipelines, layouts=layouts, reason=reason))

    def drain(
        self, node: str, *, deadline_s: float = 60.0, reason: str = "requested", wait: bool = False
    ) -> DrainRecord:
        """See AsyncHandle.drain."""
        return self._loop.run(self._inner.drain(node, deadline_s=deadline_s, reason=reason, wait=wait))

    def drains(self) -> list[DrainRecord]:
        """See AsyncHandle.drains."""
        return self._loop.run(self._inner.drains())

    def undrain(self, node: str) -> DrainRecord:
        """See AsyncHandle.undrain."""
        return self._loop.run(self._inner.undrain(node))

    def events(self) -> list[Event]:
        """See AsyncHandle.events."""
        return self._loop.run(self._inner.events())

    def config(self) -> UserConfig:
        """See AsyncHandle.config."""
        return self._loop.run(self._inner.config())

    def configure(self, **sections: Any) -> UserConfig:
        """See AsyncHandle.configure."""
        return self._loop.run(self._inner.configure(**sections))

    def generate(self, prompt: str | Sequence[int], **sampling: Any) -> str:
        """See AsyncHandle.generate."""
        return self._loop.run(self._inner.generate(prompt, **sampling))

    def stream(self, prompt: str | Sequence[int], **sampling: Any) -> Iterator[str]:
        """See AsyncHandle.stream."""
        return self._loop.iterate(self._inner.stream(prompt, **sampling))


class RefactorJob:
    """A refactoring that was asked for.

    Attributes:
        id: its name on the server.
        plan: what is done, or would be.
    """

    def __init__(self, loop: LoopThread, inner: AsyncRefactorJob) -> None:
        self.id: str = inner.id
        self.plan: RefactorPlan = inner.plan
        self._loop = loop
        self._inner = inner

    def record(self) -> RefactorRecord:
        """All that is known of it now."""
        return self._loop.run(self._inner.record())

    def wait(
        self, timeout: float | None = None, on_progress: Callable[[RefactorRecord], object] | None = None
    ) -> RefactorRecord:
        """See AsyncRefactorJob.wait; ``on_progress`` is called in this thread."""
        for record in self._loop.iterate(self._inner.watch(timeout=timeout)):
            if on_progress is not None:
                on_progress(record)
        return record

    def cancel(self) -> RefactorRecord:
        """See AsyncRefactorJob.cancel."""
        return self._loop.run(self._inner.cancel())
