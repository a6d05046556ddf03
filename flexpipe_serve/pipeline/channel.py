"""Persistent data channels: one inbox a process, one outlet an edge, multipart messages without copies or pickle.

ZeroMQ underneath: ``ipc`` inside a node; ``tcp`` with CURVE keys between nodes, where an inbox accepts only peers
that hold the application's own key pair.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import zmq
from zmq.utils import z85

from flexpipe_serve.pipeline.messages import Frame

_COPY_BELOW = 16 * 1024  # smaller frames are cheaper to copy than to track
_LINGER_MS = 1000  # what was sent before a rewiring still arrives
_ZAP_DOMAIN = "flexpipe"


@dataclass(frozen=True)
class CurveKeys:
    """The application's key pair for tcp, text in Z85."""

    public: str
    secret: str

    @staticmethod
    def generate() -> CurveKeys:
        """A fresh pair."""
        public, secret = zmq.curve_keypair()
        return CurveKeys(public.decode(), secret.decode())


@dataclass(frozen=True)
class Endpoint:
    """Where an inbox listens. A peer on the same node takes ``ipc``, any other ``tcp``."""

    node: str
    ipc: str
    tcp: str = ""


class Inbox(Protocol):
    """Receives messages from any number of outlets; those of one outlet arrive in order."""

    endpoint: Endpoint

    def receive(self, timeout_s: float) -> Sequence[Frame] | None:
        """The next message, or None: the time is over, or somebody called ``wake``."""
        ...

    def wake(self) -> None:
        """Let a waiting ``receive`` return None. The one method that any thread may call."""
        ...

    def close(self) -> None: ...


class Outlet(Protocol):
    """Sends messages to one inbox, in order; never blocks. Owned by one thread."""

    def send(self, frames: Sequence[Frame]) -> None: ...

    def close(self) -> None: ...


class ZmqInbox:
    """An inbox on ZeroMQ PULL sockets.

    Args:
        name: unique among the inboxes in ``folder``.
        folder: where the ipc socket stands; short, for socket paths end at 107 bytes.
        node: identifies the machine.
        keys: given, it also listens on tcp.
    """

    def __init__(self, name: str, *, folder: Path, node: str, keys: CurveKeys | None = None) -> None:
        self._path = folder / f"{name}.sock"
        self._context = zmq.Context()
        self._poller = zmq.Poller()
        ipc = f"ipc://{self._path}"
        self._sockets = [self._pull_socket()]
        self._sockets[0].bind(ipc)
        self._gate: _CurveGate | None = None
        tcp = self._listen_on_tcp(keys) if keys is not None else ""
        self.endpoint = Endpoint(node=node, ipc=ipc, tcp=tcp)
        self._wake_lock = threading.Lock()
        self._wake_in = self._context.socket(zmq.PAIR)
        self._wake_out = self._context.socket(zmq.PAIR)
        self._wake_in.bind("inproc://wake")
        self._wake_out.connect("inproc://wake")
        self._poller.register(self._wake_in, zmq.POLLIN)

    def receive(self, timeout_s: float) -> Sequence[Frame] | None:
        while ready := dict(self._poller.poll(int(timeout_s * 1000))):
            if self._wake_in in ready:
                while self._wake_in.poll(0):
                    self._wake_in.recv()
            if self._gate is not None and self._gate.socket in ready:
                self._gate.answer()
            for socket_ in self._sockets:
                if socket_ in ready:
                    return [frame.buffer for frame in socket_.recv_multipart(copy=False)]
            if self._wake_in in ready:
                break
        return None

    def wake(self) -> None:
        with self._wake_lock:
            if not self._wake_out.closed:
                self._wake_out.send(b"")

    def close(self) -> None:
        with self._wake_lock:
            self._context.destroy(linger=0)
        self._path.unlink(missing_ok=True)

    def _pull_socket(self) -> zmq.Socket[bytes]:
        socket_ = self._context.socket(zmq.PULL)
        socket_.set_hwm(0)
        self._poller.register(socket_, zmq.POLLIN)
        return socket_

    def _listen_on_tcp(self, keys: CurveKeys) -> str:
        self._gate = _CurveGate(self._context, public=keys.public.encode())
        self._poller.register(self._gate.socket, zmq.POLLIN)
        socket_ = self._pull_socket()
        socket_.curve_server = True
        socket_.curve_publickey = keys.public.encode()
        socket_.curve_secretkey = keys.secret.encode()
        socket_.zap_domain = _ZAP_DOMAIN.encode()
        self._sockets.append(socket_)
        address = own_address()
        return f"tcp://{address}:{socket_.bind_to_random_port(f'tcp://{address}')}"


class _CurveGate:
    """Lets in peers that hold the application's own key; answers ZeroMQ's ZAP questions (its RFC 27).

    It runs inside ``receive``, so it needs no thread of its own.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], *, public: bytes) -> None:
        self._public = public
        self.socket = context.socket(zmq.REP)
        self.socket.linger = 0
        self.socket.bind("inproc://zeromq.zap.01")

    def answer(self) -> None:
        version, request, _domain, _address, _identity, mechanism, *credentials = self.socket.recv_multipart()
        known = mechanism == b"CURVE" and z85.encode(credentials[0]) == self._public
        status = (b"200", b"OK") if known else (b"400", b"unknown key")
        self.socket.send_multipart([version, request, *status, b"", b""])


class ZmqOutlet:
    """An outlet on a ZeroMQ PUSH socket.

    Args:
        endpoint: of the inbox.
        node: of this process; decides between ipc and tcp.
        keys: needed for tcp.
    """

    def __init__(self, endpoint: Endpoint, *, node: str, keys: CurveKeys | None = None) -> None:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        self._socket = context.socket(zmq.PUSH)
        self._socket.set_hwm(0)
        self._socket.linger = _LINGER_MS
        self._socket.copy_threshold = _COPY_BELOW
        if endpoint.node == node:
            self._socket.connect(endpoint.ipc)
            return
        if keys is None or not endpoint.tcp:
            raise ValueError(f"inbox on node {endpoint.node!r} needs tcp keys to be reached from node {node!r}.")
        self._socket.curve_serverkey = keys.public.encode()
        self._socket.curve_publickey = keys.public.encode()
        self._socket.curve_secretkey = keys.secret.encode()
        self._socket.connect(endpoint.tcp)

    def send(self, frames: Sequence[Any]) -> None:
        self._socket.send_multipart(frames, copy=False)

    def close(self) -> None:
        self._socket.close()


def own_address() -> str:
    """This machine's address as other nodes see it; the loopback where there is no network."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("10.255.255.255", 1))  # sends nothing, only chooses the interface
        except OSError:
            return "127.0.0.1"
        return str(probe.getsockname()[0])
