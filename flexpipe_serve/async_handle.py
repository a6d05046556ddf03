"""A served application from Python, for asyncio; ``handle.py`` has the same without."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from typing import Any, Generic, NoReturn, TypeVar

import msgspec
import pydantic

from flexpipe_serve.config import UserConfig
from flexpipe_serve.engine.scale_record import PipelineLayout, ScaleRecord, ScaleRequest
from flexpipe_serve.engine.status import Event, ServerStatus
from flexpipe_serve.errors import (
    EngineUnavailableError,
    InvalidRequestError,
    QueueFullError,
    RefactorBusyError,
    RefactorRefusedError,
)
from flexpipe_serve.placement.drain import DrainRecord, DrainRequest
from flexpipe_serve.planner.types import Decision
from flexpipe_serve.planner.wire import from_wire
from flexpipe_serve.refactor.record import Mode, RefactorPlan, RefactorRecord, RefactorRequest
from flexpipe_serve.transport import Transport

_POLL_S = 0.1
_T = TypeVar("_T")


class _List(msgspec.Struct, Generic[_T]):
    data: list[_T]


class AsyncRefactorJob:
    """A refactoring that was asked for.

    Attributes:
        id: its name on the server.
        plan: what is done, or would be.
    """

    def __init__(self, handle: AsyncHandle, record: RefactorRecord) -> None:
        self.id: str = record.id
        self.plan: RefactorPlan = record.plan
        self._handle = handle
        self._last = record

    async def record(self) -> RefactorRecord:
        """All that is known of it now."""
        if not self._last.is_over:
            self._last = await self._handle.call("GET", f"/flexpipe/refactor/{self.id}", RefactorRecord)
        return self._last

    async def watch(self, *, timeout: float | None = None) -> AsyncGenerator[RefactorRecord]:  # noqa: ASYNC109
        """Its record, again and again until it is over.

        Raises:
            TimeoutError: it is not over after ``timeout`` seconds; it goes on.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while not (record := await self.record()).is_over:
            yield record
            if deadline is not None and time.monotonic() >= deadline:
                raise TimeoutError(f"refactoring {self.id} is in phase {record.phase} after {timeout:g} s; it goes on.")
            await asyncio.sleep(_POLL_S)
        yield record

    async def wait(
        self,
        timeout: float | None = None,  # noqa: ASYNC109
        on_progress: Callable[[RefactorRecord], object] | None = None,
    ) -> RefactorRecord:
        """Wait until it is over, however it ends: see the record's ``outcome`` and ``error``.

        Args:
            timeout: seconds.
            on_progress: called with the record now and then, and at the end.

        Raises:
            TimeoutError: it is not over by then; it goes on.
        """
        async with aclosing(self.watch(timeout=timeout)) as records:
            async for record in records:
                if on_progress is not None:
                    on_progress(record)
        return self._last

    async def cancel(self) -> RefactorRecord:
        """Ask it to stop; ``wait`` tells whether it did. After the switch this is without effect."""
        return await self._handle.call("DELETE", f"/flexpipe/refactor/{self.id}", RefactorRecord)


class AsyncHandle:
    """A served application. Of one event loop.

    All methods raise EngineUnavailableError where it cannot answer now.
    """

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    async def __aenter__(self) -> AsyncHandle:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Let connections go."""
        await self._transport.close()

    async def status(self) -> ServerStatus:
        """Layout, epoch, stages with their layers and memory, KV use, queue: of the first pipeline, and under
        ``pipelines`` of all."""
        return await self.call("GET", "/flexpipe/status", ServerStatus)

    async def plan(self) -> Decision:
        """What the planner would do now, and why; nothing comes of it.

        Raises:
            EngineUnavailableError: also while there is no profile of the model to plan by.
        """
        return _decision(await self.call("GET", "/flexpipe/plan", dict[str, Any]))

    async def decisions(self) -> list[Decision]:
        """The planner's latest decisions, also those to stay, the newest last."""
        answer = await self.call("GET", "/flexpipe/decisions", _List[dict[str, Any]])
        return [_decision(content) for content in answer.data]

    async def refactor(
        self,
        *,
        stages: int | None = None,
        boundaries: Sequence[int] | None = None,
        pipeline: int = 0,
        nodes: Sequence[str] | None = None,
        avoid: Sequence[str] = (),
        mode: Mode | str = Mode.LIVE,
        hurry: bool = False,
        dry_run: bool = False,
        resize_kv: bool = True,
        max_bytes_per_s: float | None = None,
        timeout_s: float = 300.0,
        reason: str = "requested",
        wait: bool = False,
    ) -> AsyncRefactorJob:
        """Change a pipeline's split while it serves.

        Args:
            stages: number of stages, with layers split evenly; or
            boundaries: first layer of each later stage.
            pipeline: number of the pipeline, where there are several.
            nodes: where each stage shall stand, in order: ids as in the status, their beginnings, or names.
            avoid: nodes where no stage shall stand afterwards.
            mode: 'live', or one that stops: 'weights_only', 'sync', 'restart'.
            hurry: load weights without sparing those who wait for tokens: it is over in a second rather than in many.
            dry_run: only plan; the job is over at once, its plan says what would be done.
            resize_kv: let KV capacity grow afterwards.
            max_bytes_per_s: limit of copying KV; the server's by default.
            timeout_s: until the switch; then it is aborted.
            reason: stands in the record.
            wait: return when it is over, else when it has started.

        Raises:
            RefactorRefusedError: it cannot be done; nothing was touched.
            RefactorBusyError: another one is running.
            InvalidRequestError: an argument is out of range.
        """
        try:
            mode = Mode(mode)
        except ValueError:
            known = ", ".join(repr(known.value) for known in Mode)
            raise InvalidRequestError(f"mode is {mode!r}; it is one of {known}.", param="mode") from None
        request = RefactorRequest(
            stages=stages,
            boundaries=None if boundaries is None else tuple(boundaries),
            pipeline=pipeline,
            nodes=None if nodes is None else tuple(nodes),
            avoid=tuple(avoid),
            mode=mode,
            hurry=hurry,
            dry_run=dry_run,
            resize_kv=resize_kv,
            max_bytes_per_s=max_bytes_per_s,
            timeout_s=timeout_s,
            reason=reason,
        )
        job = AsyncRefactorJob(self, await self.call("POST", "/flexpipe/refactor", RefactorRecord, request))
        if wait:
            await job.wait()
        return job

    async def refactoring(self, refactoring_id: str) -> AsyncRefactorJob:
        """A refactoring that somebody started. Raises InvalidRequestError where there is none of this id."""
        return AsyncRefactorJob(self, await self.call("GET", f"/flexpipe/refactor/{refactoring_id}", RefactorRecord))

    async def refactorings(self) -> list[RefactorRecord]:
        """Records of the latest refactorings, the newest last."""
        return (await self.call("GET", "/flexpipe/refactor", _List[RefactorRecord])).data

    async def scale(
        self,
        *,
        pipelines: int | None = None,
        layouts: Sequence[int | Sequence[int]] | None = None,
        reason: str = "requested",
    ) -> ScaleRecord:
        """Let pipelines come and go while they serve; returns when they have.

        Args:
            pipelines: how many there shall be: further ones are split like the first, and of too many the last ones
                go. Their sequences go on in the others. Or
            layouts: the split of each, in order: a number of stages, or boundaries as for ``refactor``.
            reason: stands in the events.

        Raises:
            RefactorRefusedError: there is no room, or the model cannot be cut like that; what serves goes on.
            RefactorBusyError: they come or go already, or a refactoring runs.
            InvalidRequestError: an argument is out of range.
        """
        request = ScaleRequest(
            pipelines=pipelines,
            layouts=None if layouts is None else tuple(map(_pipeline_layout, layouts)),
            reason=reason,
        )
        return await self.call("POST", "/flexpipe/scale", ScaleRecord, request)

    async def drain(
        self, node: str, *, deadline_s: float = 60.0, reason: str = "requested", wait: bool = False
    ) -> DrainRecord:
        """Empty a node before it goes: its stages move elsewhere while they serve, and none is launched there.

        Args:
            node: its id as in the status, the beginning of that, or its address.
            deadline_s: until it may be gone; asked again, it gets the new deadline.
            reason: stands in the record.
            wait: return when it is empty, or gone; else at once.

        Raises:
            RefactorRefusedError: there is no other node.
            InvalidRequestError: there is no such node, or the deadline is out of range.
        """
        request = DrainRequest(node=node, deadline_s=deadline_s, reason=reason)
        record = await self.call("POST", "/flexpipe/drain", DrainRecord, request)
        while wait and not record.is_over:
            await asyncio.sleep(_POLL_S)
            record = await self.call("GET", f"/flexpipe/drain/{record.node}", DrainRecord)
        return record

    async def drains(self) -> list[DrainRecord]:
        """Records of the nodes that are being emptied or kept empty."""
        return (await self.call("GET", "/flexpipe/drain", _List[DrainRecord])).data

    async def undrain(self, node: str) -> DrainRecord:
        """Let stages be launched on a node, named by its id, again. Its last record.

        Raises:
            InvalidRequestError: it is not being drained.
            RefactorRefusedError: Ray itself drains it.
        """
        return await self.call("DELETE", f"/flexpipe/drain/{node}", DrainRecord)

    async def events(self) -> list[Event]:
        """What happened lately, the newest last."""
        return (await self.call("GET", "/flexpipe/events", _List[Event])).data

    async def config(self) -> UserConfig:
        """The ``user_config`` in force, with the defaults of what is not set."""
        return _user_config(await self.call("GET", "/flexpipe/config", dict[str, Any]))

    async def configure(self, **sections: Any) -> UserConfig:
        """Change some keys of the ``user_config``, such as ``planner={"mode": "on"}``; None: the default.

        Serve keeps the change, so the next Router has it too, until a ``serve deploy`` sets what its file says.

        Returns:
            All of it, which is in force then; a layout takes its time, and the status tells if it cannot be had.

        Raises:
            InvalidRequestError: it is wrong, and nothing was changed.
        """
        return _user_config(await self.call("PATCH", "/flexpipe/config", dict[str, Any], sections))

    async def generate(self, prompt: str | Sequence[int], **sampling: Any) -> str:
        """The text after a prompt.

        Args:
            prompt: text or token ids.
            sampling: parameters of ``/v1/completions`` but ``n`` and ``stream``, such as ``max_tokens``.

        Raises:
            InvalidRequestError: a parameter is wrong, or the prompt does not fit.
            QueueFullError: too many requests wait.
        """
        answer = await self.call("POST", "/v1/completions", dict[str, Any], _completion(prompt, sampling))
        text: str = answer["choices"][0]["text"]
        return text

    async def stream(self, prompt: str | Sequence[int], **sampling: Any) -> AsyncGenerator[str]:
        """The text after a prompt, as it comes; closing the iterator ends the generation. See ``generate``."""
        body = msgspec.json.encode({**_completion(prompt, sampling), "stream": True})
        async with aclosing(self._transport.send("POST", "/v1/completions", body)) as pieces:
            status, headers = await _head(pieces)
            if status >= 400:
                _raise_error(status, headers, await _rest(pieces))
            async for data in _events(pieces):
                chunk = msgspec.json.decode(data)
                if "error" in chunk:
                    _raise_error(500, headers, data)
                if chunk["choices"] and (text := chunk["choices"][0]["text"]):
                    yield text

    async def call(self, method: str, path: str, kind: type[_T], body: Any = None) -> _T:
        """The answer of a route, as ``kind``; an error's as the exception it came of."""
        content = b"" if body is None else msgspec.json.encode(body)
        async with aclosing(self._transport.send(method, path, content)) as pieces:
            status, headers = await _head(pieces)
            data = await _rest(pieces)
        if status >= 400:
            _raise_error(status, headers, data)
        try:
            return msgspec.json.decode(data, type=kind)
        except msgspec.DecodeError:
            raise _foreign(status, data) from None


def _pipeline_layout(layout: int | Sequence[int]) -> PipelineLayout:
    return PipelineLayout(stages=layout) if isinstance(layout, int) else PipelineLayout(boundaries=tuple(layout))


def _decision(content: dict[str, Any]) -> Decision:
    try:
        return from_wire(content)
    except msgspec.ValidationError:
        raise _foreign(200, msgspec.json.encode(content)) from None


def _user_config(content: dict[str, Any]) -> UserConfig:
    try:
        return UserConfig.model_validate(content)
    except pydantic.ValidationError:
        raise _foreign(200, msgspec.json.encode(content)) from None


def _completion(prompt: str | Sequence[int], sampling: dict[str, Any]) -> dict[str, Any]:
    for name in ("n", "stream", "stream_options"):
        if name in sampling:
            raise InvalidRequestError(f"{name} is not for a handle: one text comes of one call.", param=name)
    return {"prompt": prompt if isinstance(prompt, str) else list(prompt), **sampling}


async def _head(pieces: AsyncIterator[Any]) -> tuple[int, dict[str, str]]:
    status, headers = await anext(pieces)
    return status, headers


async def _rest(pieces: AsyncIterator[Any]) -> bytes:
    return b"".join([piece async for piece in pieces])


async def _events(pieces: AsyncIterator[Any]) -> AsyncIterator[bytes]:
    """The data of server-sent events, one line each, up to ``[DONE]``."""
    pending = b""
    async for piece in pieces:
        *events, pending = (pending + piece).split(b"\n\n")
        for event in events:
            data = event.removeprefix(b"data: ")
            if data == b"[DONE]":
                return
            yield data


def _foreign(status: int, data: bytes) -> EngineUnavailableError:
    seen = data[:200].decode(errors="replace")
    return EngineUnavailableError(f"The answer (status {status}) is not one of flexpipe-serve: {seen!r}.")


def _raise_error(status: int, headers: dict[str, str], data: bytes) -> NoReturn:
    try:
        error = msgspec.json.decode(data)["error"]
        message, param, code = str(error["message"]), error["param"], error["code"]
    except (msgspec.DecodeError, KeyError, TypeError):
        raise _foreign(status, data) from None
    if code == "refactor_refused":
        raise RefactorRefusedError(message)
    if code == "refactor_busy":
        raise RefactorBusyError(message)
    if status == 429:
        raise QueueFullError(message, retry_after_s=int(headers.get("retry-after", 1)))
    if status >= 500:
        raise EngineUnavailableError(message)
    raise InvalidRequestError(message, param=param, code=code)
