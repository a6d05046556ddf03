"""One wave of requests against one server, open or closed loop."""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from flexpipe_serve.bench.arrivals import Arrival
from flexpipe_serve.bench.client import Recording, Target, exchange
from flexpipe_serve.bench.stream import Completion, StreamError, read_completion


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """What became of one request. Times are seconds after the wave's start.

    Args:
        start_s: when the user's wait begins: the due time in an open loop, the sending in a closed one.
        sent_s: when the connection was begun; later than ``start_s`` only if the client could not keep up.
        end_s: last byte, or when it failed.
        num_prompt_tokens: as asked for.
        server_prompt_tokens: as the server counted, if it says.
        num_output_tokens: delivered, by ``usage`` where given, else pieces of text.
        token_times_s: arrival of each piece of text.
        finish_reason: the server's.
        pieces: what it said; none for a failed request.
        error: why it failed; ``None`` is success.
    """

    start_s: float
    sent_s: float
    end_s: float
    num_prompt_tokens: int
    server_prompt_tokens: int | None = None
    num_output_tokens: int = 0
    token_times_s: tuple[float, ...] = ()
    finish_reason: str | None = None
    pieces: tuple[str, ...] = ()
    error: str | None = None

    @property
    def text(self) -> str:
        """All pieces joined."""
        return "".join(self.pieces)


@dataclass(frozen=True, slots=True)
class Wave:
    """All requests of one round against one target.

    Args:
        target: the target's name.
        started_s: clock at the wave's start; comparable within one run.
        requests: in the order of the workload.
        client_cpu_s: CPU time this process used while the wave ran.
    """

    target: str
    started_s: float
    requests: tuple[RequestRecord, ...]
    client_cpu_s: float


async def run_wave(
    target: Target,
    arrivals: Sequence[Arrival],
    prompts: Sequence[str | list[int]],
    *,
    concurrency: int | None,
    timeout_s: float,
    on_done: Callable[[], None] = lambda: None,
) -> Wave:
    """Sends a workload and records every answer.

    Args:
        target: the server.
        arrivals: the workload.
        prompts: one for each arrival.
        concurrency: closed loop with so many requests in flight; ``None`` is an open loop that keeps to ``at_s``.
        timeout_s: a request that takes longer failed.
        on_done: called after each request, for a progress bar.
    """
    requests = [
        target.request(prompt, arrival.num_output_tokens) for prompt, arrival in zip(prompts, arrivals, strict=True)
    ]
    recordings: list[Recording | None] = [None] * len(requests)
    starts_s = [0.0] * len(requests)
    ends_s = [0.0] * len(requests)

    async def send(index: int) -> None:
        recordings[index] = await exchange(target, requests[index], timeout_s=timeout_s)
        ends_s[index] = time.perf_counter()
        on_done()

    async def send_in_turn(indices: "asyncio.Queue[int]") -> None:
        while not indices.empty():
            index = indices.get_nowait()
            starts_s[index] = time.perf_counter()
            await send(index)

    started_s, cpu_s = time.perf_counter(), time.process_time()
    async with asyncio.TaskGroup() as tasks:
        if concurrency is not None:
            queue: asyncio.Queue[int] = asyncio.Queue()
            for index in range(len(requests)):
                queue.put_nowait(index)
            for _ in range(min(concurrency, len(requests))):
                tasks.create_task(send_in_turn(queue))
        else:
            for index, arrival in enumerate(arrivals):
                starts_s[index] = started_s + arrival.at_s
                await asyncio.sleep(starts_s[index] - time.perf_counter())
                tasks.create_task(send(index))
    cpu_s = time.process_time() - cpu_s

    records = []
    for arrival, recording, start_s, end_s in zip(arrivals, recordings, starts_s, ends_s, strict=True):
        assert recording is not None
        records.append(_record(arrival, recording, start_s=start_s, end_s=end_s, zero_s=started_s))
    return Wave(target.name, started_s, tuple(records), cpu_s)


def _record(arrival: Arrival, recording: Recording, *, start_s: float, end_s: float, zero_s: float) -> RequestRecord:
    completion, error = Completion(), recording.failure
    if error is None:
        try:
            completion = read_completion(recording.arrivals)
        except StreamError as failure:
            error = str(failure)
    return RequestRecord(
        start_s=start_s - zero_s,
        sent_s=recording.sent_s - zero_s,
        end_s=end_s - zero_s,
        num_prompt_tokens=arrival.num_prompt_tokens,
        server_prompt_tokens=completion.num_prompt_tokens,
        num_output_tokens=completion.num_output_tokens,
        token_times_s=tuple(at_s - zero_s for at_s in completion.token_times_s),
        finish_reason=completion.finish_reason,
        pieces=tuple(completion.pieces),
        error=error,
    )
