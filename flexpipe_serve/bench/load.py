"""A steady load: a fixed number of streams, a finished one replaced at once."""

import asyncio
import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from flexpipe_serve.bench.client import Recording, Target, exchange
from flexpipe_serve.bench.stream import read_stream
from flexpipe_serve.bench.windows import Window

_POLL_S = 0.05
_RETRY_S = 0.5
"""Pause of a slot whose request failed, so that a server that refuses is not flooded."""


@dataclass(frozen=True, slots=True)
class StreamRecord:
    """What became of one stream of a steady load. Times are of ``time.perf_counter``.

    Args:
        slot: which of the concurrent places it took.
        prompt: index of its prompt.
        num_tokens: asked for.
        sent_s: when it was sent.
        end_s: when it ended, or was given up.
        token_times_s: arrival of each piece of text.
        pieces: the text.
        was_ended: the load ended, and the client gave it up.
        error: why it failed; None is success.
    """

    slot: int
    prompt: int
    num_tokens: int
    sent_s: float
    end_s: float
    token_times_s: tuple[float, ...]
    pieces: tuple[str, ...]
    was_ended: bool = False
    error: str | None = None

    @property
    def waiting(self) -> Window | None:
        """From being sent to its first token; None without one."""
        return Window(self.sent_s, self.token_times_s[0]) if self.token_times_s else None


@dataclass(slots=True)
class _Call:
    slot: int
    prompt: int
    num_tokens: int
    recording: Recording
    end_s: float = math.inf
    was_ended: bool = False

    @property
    def has_token(self) -> bool:
        return any(b"data: " in data for _, data in self.recording.arrivals)

    def is_silent(self, since_s: float) -> bool:
        arrivals, is_over = self.recording.arrivals, self.end_s < math.inf
        return not is_over and self.recording.sent_s < since_s and (not arrivals or arrivals[-1][0] < since_s)


@dataclass(slots=True)
class SteadyLoad:
    """Keeps ``concurrency`` streams going, each prompt in its turn.

    Args:
        target: the server.
        prompts: at least one; used again and again.
        concurrency: streams at once.
        num_tokens: of each stream.
        spread: the first streams are of different lengths, so that later ones begin at different times.
        timeout_s: a longer stream failed.
    """

    target: Target
    prompts: Sequence[str]
    concurrency: int
    num_tokens: int
    spread: bool
    timeout_s: float = 600.0
    _calls: list[_Call] = field(default_factory=list)
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)

    async def start(self) -> None:
        """Start the streams; returns when all have begun to answer, or the first of them failed. Where they are spread,
        only when each place is at its second: until then the streams grow longer together, and steps slower.

        Raises:
            TimeoutError: one did not in ``timeout_s``.
        """
        turn = itertools.cycle(range(len(self.prompts)))
        self._tasks = [asyncio.create_task(self._fill(slot, turn)) for slot in range(self.concurrency)]
        async with asyncio.timeout(self.timeout_s):
            while self._num_begun() < (2 if self.spread else 1):
                if any(call.recording.failure for call in self._calls):
                    break
                await asyncio.sleep(_POLL_S)

    def _num_begun(self) -> int:
        """Streams that have answered, in the place that has the fewest."""
        return min(sum(c.slot == slot and c.has_token for c in self._calls) for slot in range(self.concurrency))

    async def wait_for_tokens(self, since_s: float) -> None:
        """Returns when every stream that was sent before has said something since, or ended.

        Raises:
            TimeoutError: one did neither in ``timeout_s``.
        """
        async with asyncio.timeout(self.timeout_s):
            while True:
                if not any(call.is_silent(since_s) for call in self._calls):
                    return
                await asyncio.sleep(_POLL_S)

    async def stop(self) -> list[StreamRecord]:
        """Give up the streams that are running, and read all answers."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        calls, self._calls, self._tasks = self._calls, [], []
        return [_record(call) for call in calls]

    async def _fill(self, slot: int, turn: "itertools.cycle[int]") -> None:
        num_tokens = self.num_tokens
        if self.spread:
            num_tokens = math.ceil(num_tokens * (slot + 1) / self.concurrency)
        while True:
            prompt = next(turn)
            request = self.target.request(self.prompts[prompt], num_tokens)
            call = _Call(slot, prompt, num_tokens, Recording(time.perf_counter()))
            self._calls.append(call)
            try:
                await exchange(self.target, request, timeout_s=self.timeout_s, recording=call.recording)
            except asyncio.CancelledError:
                call.was_ended = True
                raise
            finally:
                call.end_s = time.perf_counter()
            if call.recording.failure or not call.has_token:
                await asyncio.sleep(_RETRY_S)
            num_tokens = self.num_tokens


def _record(call: _Call) -> StreamRecord:
    completion, error = read_stream(call.recording.arrivals)
    return StreamRecord(
        slot=call.slot,
        prompt=call.prompt,
        num_tokens=call.num_tokens,
        sent_s=call.recording.sent_s,
        end_s=call.end_s,
        token_times_s=tuple(completion.token_times_s),
        pieces=tuple(completion.pieces),
        was_ended=call.was_ended,
        error=call.recording.failure or (None if call.was_ended else error),
    )


def find_stalled(streams: Sequence[StreamRecord], *, after_s: float) -> list[StreamRecord]:
    """Streams that were given up at the end of the load and had been silent for more than ``after_s`` seconds: lost,
    though no error said so."""
    return [
        stream
        for stream in streams
        if stream.was_ended and stream.end_s - max((stream.sent_s, *stream.token_times_s[-1:])) > after_s
    ]
