"""Messages between processes of one node: plain unix stream sockets, one wake-up a message and no thread between.

A message is ``uint64`` words (its bytes in all, the number of frames, the bytes of each frame) and then the frames,
each padded so that all begin at multiples of 16 bytes.
"""

from __future__ import annotations

import contextlib
import logging
import select
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flexpipe_serve.pipeline.messages import Frame

logger = logging.getLogger(__name__)
_ALIGNMENT = 16
_PADDING = bytes(_ALIGNMENT)
_PREFIX = struct.Struct("<QQ")
_SEND_BUFFER_BYTES = 4 << 20
"""Asked for; the kernel gives what its ``net.core.wmem_max`` allows. What does not fit waits in this process."""
_READ_BYTES = 64 * 1024
_LINGER_S = 1.0
"""What was sent before a rewiring still arrives."""


class UnixListener:
    """Takes connections at a path, and messages from them; those of one connection in order.

    Args:
        path: of the socket; what an ended process left there is replaced.
        watch: called with a file descriptor and the function to call whenever it can be read.
        unwatch: called before a watched descriptor is closed.
        take: called with each message, and the file descriptor of its connection.
    """

    def __init__(
        self,
        path: Path,
        *,
        watch: Callable[[int, Callable[[], None]], None],
        unwatch: Callable[[int], None],
        take: Callable[[list[Frame], int], None],
    ) -> None:
        self.path = path
        self._watch, self._unwatch, self._take = watch, unwatch, take
        self._connections: dict[int, socket.socket] = {}
        self._readers: dict[int, _Reader] = {}
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.setblocking(False)
        path.unlink(missing_ok=True)
        self._socket.bind(str(path))
        self._inode = path.stat().st_ino
        self._socket.listen()
        watch(self._socket.fileno(), self._accept)

    def is_between_messages(self, connection: int) -> bool:
        """Whether what comes next over a connection, if there still is one, is the beginning of a message."""
        reader = self._readers.get(connection)
        return reader is not None and reader.is_between_messages

    def take_read(self, connection: int, data: memoryview) -> None:
        """Go on with bytes that somebody else has read from a connection that was between messages."""
        self._readers[connection].cut(data)

    def close(self) -> None:
        """Let go of all peers; what they sent and nobody took is lost."""
        for connection in (self._socket, *self._connections.values()):
            self._unwatch(connection.fileno())
            connection.close()
        self._connections.clear()
        self._readers.clear()
        with contextlib.suppress(FileNotFoundError):
            if self.path.stat().st_ino == self._inode:  # not a successor's
                self.path.unlink()

    def _accept(self) -> None:
        try:
            connection, _ = self._socket.accept()
        except OSError:
            return  # it is gone already
        connection.setblocking(False)
        number = connection.fileno()
        self._connections[number] = connection
        self._readers[number] = _Reader(connection, lambda frames: self._take(frames, number))
        self._watch(number, lambda: self._read(number))

    def _read(self, number: int) -> None:
        if not self._readers[number].read():
            self._unwatch(number)
            del self._readers[number]
            self._connections.pop(number).close()


class _Reader:
    """Cuts the bytes of one connection into messages."""

    def __init__(self, connection: socket.socket, take: Callable[[list[Frame]], None]) -> None:
        self._socket = connection
        self._take = take
        self._rest = b""
        """Less than a prefix."""
        self._message: memoryview | None = None
        """A message of which only the beginning has come."""
        self._num_filled = 0

    @property
    def is_between_messages(self) -> bool:
        """Whether the next byte begins a message."""
        return self._message is None and not self._rest

    def read(self) -> bool:
        """Take what is there, in one call of the system. False: the peer has closed the connection, or died."""
        try:
            return self._fill() if self._message is not None else self._cut()
        except BlockingIOError:
            return True
        except OSError:
            return False

    def _fill(self) -> bool:
        assert self._message is not None
        num_read = self._socket.recv_into(self._message[self._num_filled :])
        self._num_filled += num_read
        if self._num_filled == len(self._message):
            message, self._message = self._message, None
            self._take(_frames(message))
        return num_read > 0

    def _cut(self) -> bool:
        buffer = np.empty(_READ_BYTES, np.uint8).data  # a new one: the frames are parts of it
        num_rest = len(self._rest)
        buffer[:num_rest] = self._rest
        num_read = self._socket.recv_into(buffer[num_rest:])
        self.cut(buffer[: num_rest + num_read])
        return num_read > 0

    def cut(self, data: memoryview) -> None:
        """Take the messages of ``data``, which begins with one."""
        while len(data) >= _PREFIX.size:
            size, _ = _PREFIX.unpack_from(data)
            if size > len(data):
                self._message = np.empty(size, np.uint8).data
                self._message[: len(data)] = data
                self._num_filled = len(data)
                data = data[:0]
                break
            self._take(_frames(data[:size]))
            data = data[size:]
        self._rest = bytes(data)


def _frames(message: memoryview) -> list[Frame]:
    _, num_frames = _PREFIX.unpack_from(message)
    sizes = struct.unpack_from(f"<{num_frames}Q", message, _PREFIX.size)
    frames: list[Frame] = []
    at = _PREFIX.size + 8 * num_frames
    for size in sizes:
        at += -at % _ALIGNMENT
        frames.append(message[at : at + size])
        at += size
    return frames


class UnixOutlet:
    """Sends to a listener. It connects at once and never again: to a peer that is gone, or goes, messages are lost.

    What the kernel does not take at once a thread sends on; it lives only as long as there is something left.

    Args:
        path: of the listener's socket.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._waiting: deque[list[Frame]] = deque()
        """Messages that the kernel has not taken whole."""
        self._closes_at: float | None = None
        self._is_lost = False
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
        try:
            self._socket.connect(path)
        except OSError as error:
            self._lose(error)
        self._socket.setblocking(False)

    def send(self, frames: Sequence[Frame]) -> None:
        """See Outlet.send."""
        self._send(_pack(frames))

    @property
    def direct(self) -> int | None:
        """The connection's file descriptor, where a message may be written to it past this outlet; None where it is
        lost, or others wait. Followed by :meth:`send_rest`."""
        return None if self._waiting or self._is_lost else self._socket.fileno()

    def send_rest(self, pieces: list[Frame], *, num_sent: int) -> None:
        """Send what is left of a message that was written to :attr:`direct`.

        Args:
            pieces: of the whole message.
            num_sent: bytes that the kernel took.
        """
        _skip(pieces, num_sent)
        if pieces:
            self._send(pieces)

    def _send(self, message: list[Frame]) -> None:
        with self._lock:
            assert self._closes_at is None, "the outlet is closed"
            if self._waiting:  # its thread is at it
                self._waiting.append(message)
            elif not self._write(message):
                self._waiting.append(message)
                threading.Thread(target=self._send_on, name="flexpipe-outlet", daemon=True).start()

    def close(self) -> None:
        """See Outlet.close."""
        with self._lock:
            self._closes_at = time.monotonic() + _LINGER_S
            if not self._waiting:
                self._socket.close()

    def _send_on(self) -> None:
        poller = select.poll()
        poller.register(self._socket, select.POLLOUT)
        while True:
            poller.poll(1000 * _LINGER_S)
            with self._lock:
                while self._waiting and self._write(self._waiting[0]):
                    self._waiting.popleft()
                is_late = self._closes_at is not None and time.monotonic() > self._closes_at
                if self._waiting and not is_late:
                    continue
                if self._closes_at is not None:
                    self._socket.close()
                return

    def _write(self, message: list[Frame]) -> bool:
        """Give the kernel what it takes now, out of ``message``. Whether nothing is left of it."""
        while message and not self._is_lost:
            try:
                num_sent = self._socket.sendmsg(message)
            except BlockingIOError:
                return False
            except OSError as error:
                self._lose(error)
                break
            _skip(message, num_sent)
        return True

    def _lose(self, error: OSError) -> None:
        self._is_lost = True
        logger.info("%s does not answer any more: %s", self._path, error)


@dataclass(frozen=True)
class MessageStart:
    """A message but for its last frame."""

    bytes: bytearray
    """All before the last frame."""
    offsets: list[int]
    """Of the frames in the message."""
    num_bytes: int
    """Of the whole message: behind the last frame it ends with zeros."""


def start_message(frames: Sequence[Frame], *, num_last: int) -> MessageStart:
    """The message of ``frames`` and one more that has ``num_last`` bytes."""
    sizes = [*(memoryview(frame).nbytes for frame in frames), num_last]
    offsets, end = _layout(sizes)
    start = bytearray(offsets[-1])
    struct.pack_into(f"<{2 + len(sizes)}Q", start, 0, end, len(sizes), *sizes)
    for frame, at, size in zip(frames, offsets, sizes, strict=False):
        start[at : at + size] = frame
    return MessageStart(start, offsets, end)


def _layout(sizes: Sequence[int]) -> tuple[list[int], int]:
    """Where the frames of a message begin, and its bytes in all."""
    offsets, end = [], _PREFIX.size + 8 * len(sizes)
    for size in sizes:
        end += -end % _ALIGNMENT
        offsets.append(end)
        end += size
    return offsets, end + -end % _ALIGNMENT  # the next message begins aligned, too


def _pack(frames: Sequence[Frame]) -> list[Frame]:
    """The pieces of the message; none is empty."""
    views = [memoryview(frame) for frame in frames]
    sizes = [view.nbytes for view in views]
    offsets, num_bytes = _layout(sizes)
    pieces: list[Frame] = [struct.pack(f"<{2 + len(sizes)}Q", num_bytes, len(sizes), *sizes)]
    end = len(pieces[0])
    for view, at, size in zip(views, offsets, sizes, strict=True):
        if at > end:
            pieces.append(_PADDING[: at - end])
        if size:
            pieces.append(view if view.format == "B" and view.ndim == 1 else view.cast("B"))
        end = at + size
    if num_bytes > end:
        pieces.append(_PADDING[: num_bytes - end])
    return pieces


def _skip(pieces: list[Frame], num_bytes: int) -> None:
    """Take the first bytes out of ``pieces``."""
    while pieces and num_bytes >= len(pieces[0]):
        num_bytes -= len(pieces.pop(0))
    if num_bytes:
        pieces[0] = memoryview(pieces[0])[num_bytes:]
