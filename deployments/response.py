"""The answer to a generation: runs the engine while it sends."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import AsyncGenerator
from typing import cast

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from flexpipe_serve.deployments.connection import ClientGoneError, run_while_connected, send_or_leave
from flexpipe_serve.deployments.errors import ApiError, as_api_error, internal_error
from flexpipe_serve.deployments.generation import Generation, Renderer
from flexpipe_serve.deployments.request_id import request_id_of
from flexpipe_serve.deployments.sse import DONE, SSE_HEADERS, event
from flexpipe_serve.engine.client import EngineClient
from flexpipe_serve.engine.outputs import SequenceOutput

logger = logging.getLogger(__name__)

_JSON_HEADERS = [(b"content-type", b"application/json")]


class GenerationResponse(Response):
    """Generates while it answers; a client that leaves aborts its sequences before this returns.

    The status is sent with the first output: what the engine refuses still gets the right status. Later failures
    end a stream with an error event.
    """

    def __init__(self, engine: EngineClient, generation: Generation, renderer: Renderer) -> None:
        super().__init__()
        self._engine = engine
        self._generation = generation
        self._renderer = renderer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = _Answer(self._engine, self._generation, self._renderer, scope, functools.partial(send_or_leave, send))
        await run_while_connected(receive, answer.run(receive))


class _Answer:
    def __init__(
        self, engine: EngineClient, generation: Generation, renderer: Renderer, scope: Scope, send: Send
    ) -> None:
        self._engine = engine
        self._generation = generation
        self._renderer = renderer
        self._scope = scope
        self._send = send
        self._starting = asyncio.Lock()
        self._started = False

    async def run(self, receive: Receive) -> None:
        try:
            await self._generate()
        except Exception as error:  # the process edge: whatever the engine raises becomes an answer
            cause = _first_cause(error)
            if isinstance(cause, ClientGoneError):
                raise cause from None
            await self._fail(cause, receive)
        else:
            last = self._renderer.end()
            if not self._started:
                await self._start()
            await self._send_body(last, more=False)

    async def _generate(self) -> None:
        num_prompts = len(self._generation.prompts)
        if num_prompts == 1:
            await self._generate_for(0)
            return
        async with asyncio.TaskGroup() as group:
            for prompt_index in range(num_prompts):
                group.create_task(self._generate_for(prompt_index))

    async def _generate_for(self, prompt_index: int) -> None:
        generation = self._generation
        outputs = self._engine.generate(
            request_id=f"{generation.id}-{prompt_index}",
            prompt_token_ids=generation.prompts[prompt_index].token_ids,
            params=generation.params[prompt_index],
            n=generation.n,
            priority=generation.priority,
        )
        try:
            async for output in outputs:
                await self._pass_on(prompt_index, output)
        finally:
            # Left early, the engine aborts here and not when the garbage collector comes by.
            await cast("AsyncGenerator[SequenceOutput]", outputs).aclose()

    async def _pass_on(self, prompt_index: int, output: SequenceOutput) -> None:
        if output.finish_reason == "error":
            raise ApiError(500, output.error or "The engine failed.", code="generation_failed")
        data = self._renderer.add(prompt_index, output)
        if not self._renderer.streaming:
            return
        if not self._started:
            async with self._starting:  # several prompts: one starts, the others wait for it
                if not self._started:
                    await self._start()
        if data:
            await self._send_body(data, more=True)

    async def _fail(self, error: BaseException, receive: Receive) -> None:
        answer = as_api_error(error)
        if answer is None:
            request_id = request_id_of(self._scope)
            logger.error("request %s: generation failed", request_id, exc_info=error)
            answer = internal_error(request_id)
        if self._started:
            await self._send_body(event(answer.body()) + DONE, more=False)
        else:
            await answer.response()(self._scope, receive, self._send)

    async def _start(self) -> None:
        headers = SSE_HEADERS if self._renderer.streaming else _JSON_HEADERS
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        self._started = True

    async def _send_body(self, data: bytes, *, more: bool) -> None:
        await self._send({"type": "http.response.body", "body": data, "more_body": more})


def _first_cause(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
