"""Work that ends when its client goes away."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, NoReturn

from starlette.types import Message, Receive, Send


class ClientGoneError(Exception):
    """Nobody is there to read the answer."""


async def run_while_connected(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Await ``work`` in this task; if the client disconnects, cancel it and return when it has ended.

    The request's body must have been read, for ``receive`` is watched meanwhile.
    """
    try:
        async with asyncio.TaskGroup() as group:
            watch = group.create_task(_raise_on_disconnect(receive))
            await work
            watch.cancel()
    except* ClientGoneError:
        pass


async def send_or_leave(send: Send, message: Message) -> None:
    """``send``. Raises ClientGoneError where the server says that the connection is closed."""
    try:
        await send(message)
    except OSError as error:
        raise ClientGoneError from error


async def _raise_on_disconnect(receive: Receive) -> NoReturn:
    while (await receive())["type"] != "http.disconnect":
        pass
    raise ClientGoneError
