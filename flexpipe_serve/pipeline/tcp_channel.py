"""Messages between nodes: ZeroMQ over tcp with CURVE. A listener lets in only peers that hold the application's own key
pair.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence

import zmq
from zmq.utils import z85

from flexpipe_serve.pipeline.channel import CurveKeys
from flexpipe_serve.pipeline.messages import Frame

_COPY_BELOW = 16 * 1024  # smaller frames are cheaper to copy than to track
_LINGER_MS = 1000  # what was sent before a rewiring still arrives
_ZAP_DOMAIN = "flexpipe"


class TcpListener:
    """A PULL socket; the messages of one outlet come in order.

    Args:
        watch: called with a file descriptor and the function to call whenever it can be read.
        unwatch: called before a watched descriptor is closed.
        take: called with each message.
    """

    def __init__(
        self,
        keys: CurveKeys,
        *,
        watch: Callable[[int, Callable[[], None]], None],
        unwatch: Callable[[int], None],
        take: Callable[[list[Frame]], None],
    ) -> None:
        self._keys = keys
        self._unwatch, self._take = unwatch, take
        self._context = zmq.Context()
        # Before any peer connects: it answers ZeroMQ's ZAP questions (its RFC 27).
        self._gate = self._context.socket(zmq.REP)
        self._gate.linger = 0
        self._gate.bind("inproc://zeromq.zap.01")
        self._socket = self._context.socket(zmq.PULL)
        self._socket.set_hwm(0)
        self._socket.curve_server = True
        self._socket.curve_publickey = keys.public.encode()
        self._socket.curve_secretkey = keys.secret.encode()
        self._socket.zap_domain = _ZAP_DOMAIN.encode()
        host = own_address()
        self.address = f"tcp://{host}:{self._socket.bind_to_random_port(f'tcp://{host}')}"
        watch(self._gate.fileno(), self._answer)
        watch(self._socket.fileno(), self._receive)

    def close(self) -> None:
        """Let go of all peers."""
        self._unwatch(self._gate.fileno())
        self._unwatch(self._socket.fileno())
        self._context.destroy(linger=0)

    def _receive(self) -> None:
        while _has_message(self._socket):
            self._take([frame.buffer for frame in self._socket.recv_multipart(copy=False)])

    def _answer(self) -> None:
        """Let a peer in that holds the application's own key, and no other."""
        while _has_message(self._gate):
            version, request, _domain, _address, _identity, mechanism, *credentials = self._gate.recv_multipart()
            known = mechanism == b"CURVE" and z85.encode(credentials[0]) == self._keys.public.encode()
            status = (b"200", b"OK") if known else (b"400", b"unknown key")
            self._gate.send_multipart([version, request, *status, b"", b""])


def _has_message(socket: zmq.Socket[bytes]) -> bool:
    """Asked until there is none: the descriptor of a ZeroMQ socket tells of the first one only."""
    return bool(int(socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN)


class TcpOutlet:
    """Sends to a listener of another node, and connects again by itself.

    Args:
        address: of the listener.
    """

    def __init__(self, address: str, *, keys: CurveKeys) -> None:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        self._socket = context.socket(zmq.PUSH)
        self._socket.set_hwm(0)
        self._socket.linger = _LINGER_MS
        self._socket.copy_threshold = _COPY_BELOW
        self._socket.curve_serverkey = keys.public.encode()
        self._socket.curve_publickey = keys.public.encode()
        self._socket.curve_secretkey = keys.secret.encode()
        self._socket.connect(address)

    def send(self, frames: Sequence[Frame]) -> None:
        """See Outlet.send."""
        self._socket.send_multipart(frames, copy=False)

    def close(self) -> None:
        """See Outlet.close."""
        self._socket.close()


def own_address() -> str:
    """This machine's address as other nodes see it; the loopback where there is no network."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("10.255.255.255", 1))  # sends nothing, only chooses the interface
        except OSError:
            return "127.0.0.1"
        return str(probe.getsockname()[0])
