"""Persistent data channels: one inbox a process, one outlet an edge, multipart messages without pickle.

Unix sockets between processes of one node, tcp with the application's own keys between nodes; both keep the same
promises.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from flexpipe_serve.pipeline.messages import Frame


@dataclass(frozen=True)
class CurveKeys:
    """The application's key pair for tcp, text in Z85."""

    public: str
    secret: str

    @staticmethod
    def generate() -> CurveKeys:
        """A fresh pair."""
        import zmq

        public, secret = zmq.curve_keypair()
        return CurveKeys(public.decode(), secret.decode())


@dataclass(frozen=True)
class Endpoint:
    """Where an inbox listens. A peer on the same node takes ``ipc``, the path of a unix socket; any other ``tcp``."""

    node: str
    ipc: str
    tcp: str = ""


class Outlet(Protocol):
    """Sends messages to one inbox, in order; never blocks. Owned by one thread."""

    def send(self, frames: Sequence[Frame]) -> None:
        """Send a message; its frames must not change afterwards. Lost where the inbox is gone: who needs to know of a
        process that has ended watches the process."""
        ...

    def close(self) -> None:
        """Let go. What was sent still arrives, if the inbox takes it within a second."""
        ...
