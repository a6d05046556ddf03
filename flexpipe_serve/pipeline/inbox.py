"""Both ends of the channels: the inbox of a process, and outlets to those of others."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import zmq

from flexpipe_serve.pipeline.channel import CurveKeys, Endpoint, Outlet
from flexpipe_serve.pipeline.messages import Frame
from flexpipe_serve.pipeline.tcp_channel import TcpListener, TcpOutlet
from flexpipe_serve.pipeline.unix_channel import UnixListener, UnixOutlet


class Inbox:
    """Receives messages from any number of outlets; those of one outlet arrive in order. Owned by one thread.

    Args:
        name: unique among the inboxes in ``folder``.
        folder: where the socket stands; short, for socket paths end at 107 bytes.
        node: identifies the machine.
        keys: given, it also listens on tcp.
    """

    def __init__(self, name: str, *, folder: Path, node: str, keys: CurveKeys | None = None) -> None:
        self._messages: deque[Sequence[Frame]] = deque()
        self._poller = zmq.Poller()  # takes plain file descriptors as well
        self._handlers: dict[Any, Callable[[], None]] = {}
        take = self._messages.append
        unix = UnixListener(folder / f"{name}.sock", watch=self._watch, unwatch=self._unwatch, take=take)
        self._listeners: list[UnixListener | TcpListener] = [unix]
        tcp = ""
        if keys is not None:
            listener = TcpListener(keys, watch=self._watch, unwatch=self._unwatch, take=take)
            self._listeners.append(listener)
            tcp = listener.address
        self.endpoint = Endpoint(node=node, ipc=str(unix.path), tcp=tcp)
        self._wake_lock = threading.Lock()
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._is_woken = False
        self._watch(self._wake_fd, self._on_wake)

    def receive(self, timeout_s: float) -> Sequence[Frame] | None:
        """The next message, or None: the time is over, or somebody called ``wake``."""
        while not self._messages:
            ready = self._poller.poll(int(timeout_s * 1000))
            for source, _ in ready:
                self._handlers[source]()
            if self._is_woken or not ready:
                self._is_woken = False
                break
        return self._messages.popleft() if self._messages else None

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

    def _watch(self, source: Any, handler: Callable[[], None]) -> None:
        self._poller.register(source, zmq.POLLIN)
        self._handlers[source] = handler

    def _unwatch(self, source: Any) -> None:
        self._poller.unregister(source)
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
