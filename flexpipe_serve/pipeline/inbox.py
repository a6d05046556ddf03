"""Both ends of the channels: the inbox of a process, and outlets to those of others."""

from __future__ import annotations

import os
import select
import threading
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from flexpipe_serve.pipeline.channel import CurveKeys, Endpoint, Outlet
from flexpipe_serve.pipeline.messages import Frame
from flexpipe_serve.pipeline.tcp_channel import TcpListener, TcpOutlet
from flexpipe_serve.pipeline.unix_channel import UnixListener, UnixOutlet

if TYPE_CHECKING:  # it needs torch, which whoever only sends and receives does not
    from flexpipe_serve.pipeline.native_hop import NativeHop


class Inbox:
    """Receives messages from any number of outlets; those of one outlet arrive in order. Owned by one thread.

    Args:
        name: unique among the inboxes in ``folder``.
        folder: where the socket stands; short, for socket paths end at 107 bytes.
        node: identifies the machine.
        keys: given, it also listens on tcp.
    """

    def __init__(self, name: str, *, folder: Path, node: str, keys: CurveKeys | None = None) -> None:
        self._messages: deque[tuple[Sequence[Frame], int | None]] = deque()
        self._epoll = select.epoll()
        self._handlers: dict[int, Callable[[], None]] = {}
        unix = UnixListener(folder / f"{name}.sock", watch=self._watch, unwatch=self._unwatch, take=self._take)
        self._unix = unix
        self._listeners: list[UnixListener | TcpListener] = [unix]
        tcp = ""
        if keys is not None:
            listener = TcpListener(keys, watch=self._watch, unwatch=self._unwatch, take=self._take)
            self._listeners.append(listener)
            tcp = listener.address
        self.endpoint = Endpoint(node=node, ipc=str(unix.path), tcp=tcp)
        self.connection: int | None = None
        """By which the last message came: the file descriptor, or None for tcp."""
        self._wake_lock = threading.Lock()
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._is_woken = False
        self._watch(self._wake_fd, self._on_wake)

    def receive(self, timeout_s: float, hop: NativeHop | None = None) -> Sequence[Frame] | None:
        """The next message, or None: the time is over, or somebody called ``wake``.

        Args:
            hop: given, its message is not returned: the hop has taken it where None is returned and ``hop.is_done``.
        """
        while not self._messages:
            if hop is not None and self._unix.is_between_messages(hop.connection):
                read = hop.wait(self._epoll.fileno(), timeout_s)
                if hop.is_done:
                    return None
                if read is not None:
                    self._unix.take_read(hop.connection, read)
                    hop = None
                    continue
                timeout_s = 0.0  # it has waited
            ready = self._epoll.poll(timeout_s)
            for source, _ in ready:
                self._handlers[source]()
            if self._is_woken or not ready:
                self._is_woken = False
                break
        if not self._messages:
            return None
        frames, self.connection = self._messages.popleft()
        return frames

    def wake(self) -> None:
        """Let a waiting ``receive`` return None. The one method that any thread may call."""
        with self._wake_lock:
            if self._wake_fd >= 0:
                os.eventfd_write(self._wake_fd, 1)

    def close(self) -> None:
        """Receive no more."""
        for listener in self._listeners:
            listener.close()
        with self._wake_lock:
            os.close(self._wake_fd)
            self._wake_fd = -1
        self._epoll.close()

    def _take(self, frames: Sequence[Frame], connection: int | None = None) -> None:
        self._messages.append((frames, connection))

    def _watch(self, source: int, handler: Callable[[], None]) -> None:
        self._epoll.register(source, select.EPOLLIN)
        self._handlers[source] = handler

    def _unwatch(self, source: int) -> None:
        self._epoll.unregister(source)
        del self._handlers[source]

    def _on_wake(self) -> None:
        os.eventfd_read(self._wake_fd)
        self._is_woken = True


def connect(endpoint: Endpoint, *, node: str, keys: CurveKeys | None = None) -> Outlet:
    """An outlet to an inbox.

    Args:
        node: of this process; decides between the unix socket and tcp.
        keys: needed for tcp.
    """
    if endpoint.node == node:
        return UnixOutlet(endpoint.ipc)
    if keys is None or not endpoint.tcp:
        raise ValueError(f"inbox on node {endpoint.node!r} needs tcp keys to be reached from node {node!r}.")
    return TcpOutlet(endpoint.tcp, keys=keys)
