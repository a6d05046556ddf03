"""A stage's part of a step from message to message in one call of the kernels: see ``csrc/hop.h``.

What Python does for the step, it does before its hidden states come and after they have gone on.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np

from flexpipe_serve.kernels.native_layer import LayerRun
from flexpipe_serve.pipeline.messages import Frame, HiddenHeader, encode_header
from flexpipe_serve.pipeline.prepared_step import PreparedStep
from flexpipe_serve.pipeline.unix_channel import UnixOutlet, start_message

_HIDDEN = np.dtype(np.float32)
_TIME = np.dtype(np.float64)
_READ_OTHER, _DONE = 1, 2


class _Hop(ctypes.Structure):
    """``flexpipe::Hop``."""

    _fields_ = (
        ("head", ctypes.c_void_p),
        ("num_head", ctypes.c_int64),
        ("message", ctypes.c_void_p),
        ("num_expected", ctypes.c_int64),
        ("times", ctypes.c_void_p),
        ("num_times", ctypes.c_int64),
        ("layers", ctypes.c_void_p),
        ("kvs", ctypes.c_void_p),
        ("num_layers", ctypes.c_int64),
        ("batch", ctypes.c_void_p),
        ("hidden", ctypes.c_void_p),
        ("rotary", ctypes.c_void_p),
        ("num_rows", ctypes.c_int64),
        ("num_threads", ctypes.c_int64),
        ("beginning", ctypes.c_void_p),
        ("num_beginning", ctypes.c_int64),
        ("sent_times", ctypes.c_void_p),
        ("end", ctypes.c_void_p),
        ("num_end", ctypes.c_int64),
        ("seconds_before", ctypes.c_double),
        ("connection", ctypes.c_int64),
        ("to", ctypes.c_int64),
        ("lingers", ctypes.c_int64),
        ("num_received", ctypes.c_int64),
        ("num_sent", ctypes.c_int64),
        ("seconds", ctypes.c_double),
    )


@dataclass(frozen=True)
class HiddenSource:
    """Where the hidden states of an epoch come from."""

    connection: int
    """File descriptor."""
    num_times: int
    """Numbers in the first buffer of its messages."""


class NativeHop:
    """One step after the other, all of the same shape, that wait for their hidden states or have them.

    Args:
        step: the first one.
        source: None where the caller writes ``hidden`` and ``times`` and calls :meth:`run`, else for :meth:`wait`.
        hidden_size: of the model.
        num_threads: for the kernels.
        outlet: takes the results; None where they stay in ``hidden``.

    Attributes:
        step: the one that is to run, or has.
        hidden: float32 [num_tokens, hidden_size].
        times: float64, held seconds and compute seconds of the stages before.
        is_done: the layers have run.
        is_spent: the buffers are in other hands: no further step.
    """

    def __init__(
        self,
        step: PreparedStep,
        run: LayerRun,
        *,
        source: HiddenSource | None,
        hidden_size: int,
        num_threads: int,
        outlet: UnixOutlet | None,
    ) -> None:
        self.is_spent = False
        self._run, self._source, self._outlet = run, source, outlet
        header = self._header(step, hidden_size)
        num_tokens = step.batch.header.num_tokens
        num_last = num_tokens * hidden_size * _HIDDEN.itemsize
        num_times = 1 if source is None else source.num_times
        start = start_message([header, bytes(num_times * _TIME.itemsize)], num_last=num_last)
        at_header, at_times, at_hidden = start.offsets
        self._message = np.empty(start.num_bytes, np.uint8)
        self.times = self._message[at_times:][: num_times * _TIME.itemsize].view(_TIME)
        self.hidden = self._message[at_hidden:][:num_last].view(_HIDDEN).reshape(num_tokens, hidden_size)
        self._head = np.frombuffer(start.bytes, np.uint8)[: at_header + len(header)]
        self._headers = [self._head[at_header:]]
        self._struct = _Hop(
            head=self._head.ctypes.data,
            num_head=len(self._head),
            message=self._message.ctypes.data,
            num_expected=start.num_bytes,
            times=self.times.ctypes.data,
            num_times=num_times,
            layers=ctypes.addressof(run.layers),
            kvs=ctypes.addressof(run.kvs),
            num_layers=run.num_layers,
            hidden=self.hidden.ctypes.data,
            num_rows=num_tokens,
            connection=-1 if source is None else source.connection,
        )
        self._pieces: list[Frame] = []
        if outlet is not None:
            sent = start_message([header, bytes((num_times + 1) * _TIME.itemsize)], num_last=num_last)
            at_header, at_times, _ = sent.offsets
            beginning = np.frombuffer(sent.bytes, np.uint8)
            self._headers.append(beginning[at_header:][: len(header)])
            end = np.zeros(sent.num_bytes - len(beginning) - num_last, np.uint8)
            self._pieces = [piece for piece in (beginning.data, self.hidden.data.cast("B"), end.data) if len(piece)]
            self._num_to_send = sent.num_bytes
            self._struct.beginning = beginning.ctypes.data
            self._struct.num_beginning = len(beginning)
            self._struct.sent_times = beginning.ctypes.data + at_times
            self._struct.end = end.ctypes.data
            self._struct.num_end = len(end)
        self._set(step, header, num_threads)

    def take(self, step: PreparedStep, run: LayerRun, *, source: HiddenSource | None, num_threads: int) -> bool:
        """Go on with another step. False where that takes another hop."""
        if self.is_spent or run is not self._run or source != self._source:
            return False
        num_tokens, hidden_size = self.hidden.shape
        header = self._header(step, hidden_size)
        if step.batch.header.num_tokens != num_tokens or len(header) != len(self._headers[0]):
            return False
        self._set(step, header, num_threads)
        return True

    @property
    def connection(self) -> int:
        """Of the source."""
        return -1 if self._source is None else self._source.connection

    @property
    def can_send(self) -> bool:
        """Whether the outlet, if there is one, can be written to past its queue."""
        return self._outlet is None or self._outlet.direct is not None

    @property
    def seconds(self) -> float:
        """How long the layers took."""
        return float(self._struct.seconds)

    def linger(self, lingers: bool) -> None:
        """Whether :meth:`wait` ends only when there is something else to do."""
        self._struct.lingers = lingers

    def wait(self, epoll: int, timeout_s: float) -> memoryview | None:
        """Wait for anything that ``epoll`` watches, and if it is the hidden states, run the layers and send the result.

        Returns:
            What was read from the connection and is no message of this step: the hop is spent.
        """
        self._open()
        result = self._run.library.flexpipe_await_hop(ctypes.byref(self._struct), epoll, int(1000 * timeout_s))
        if result == _DONE:
            self._close()
        elif result == _READ_OTHER and self._struct.num_received > 0:
            self.is_spent = True
            return self._message.data[: self._struct.num_received]
        return None

    def run(self, *, seconds: float) -> None:
        """Run the layers and send the result.

        Args:
            seconds: of this stage for the step, so far.
        """
        self._struct.seconds_before = seconds
        self._open()
        self._run.library.flexpipe_run_hop(ctypes.byref(self._struct))
        self._close()

    def _set(self, step: PreparedStep, header: bytes, num_threads: int) -> None:
        self.step = step
        self._struct.num_threads = num_threads
        self.is_done = False
        for place in self._headers:
            place.data[:] = header
        self._struct.batch = ctypes.addressof(step.plan.batch)
        self._struct.rotary = step.rotary.data_ptr()

    def _open(self) -> None:
        assert not self.is_spent
        assert not self.is_done
        if self._outlet is not None:
            direct = self._outlet.direct
            assert direct is not None, "others wait to be sent"
            self._struct.to = direct

    def _close(self) -> None:
        self.is_done = True
        if self._outlet is not None:
            num_sent = max(0, self._struct.num_sent)
            if num_sent < self._num_to_send:
                self.is_spent = True
                self._outlet.send_rest(list(self._pieces), num_sent=num_sent)

    @staticmethod
    def _header(step: PreparedStep, hidden_size: int) -> bytes:
        header = step.batch.header
        shape = (header.num_tokens, hidden_size)
        return encode_header(HiddenHeader(epoch=header.epoch, step=header.step, shape=shape, dtype=_HIDDEN.name))
