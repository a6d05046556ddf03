"""Seeded requests of every kind, and a load made of them, for tests in which a pipeline changes meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from engines import generate

from flexpipe_serve.engine.engine import Engine
from flexpipe_serve.engine.fleet import Fleet
from flexpipe_serve.engine.outputs import SequenceOutput
from flexpipe_serve.engine.sampling_params import SamplingParams

VOCAB = range(3, 131)


@dataclass(frozen=True)
class Request:
    """One request, and when somebody aborts it."""

    id: str
    prompt: list[int]
    params: SamplingParams
    n: int = 1
    priority: int = 0
    abort_after: int | None = None
    """That many ticks (or outputs) after it was sent."""


def make_requests(rng: random.Random, num_requests: int, *, max_tokens: int = 60) -> list[Request]:
    """Greedy and sampled, with and without log probabilities and penalties, short and longer than a step, many with
    common beginnings; some score their prompt, some are aborted, some end at a stop token."""
    beginnings = [[rng.choice(VOCAB) for _ in range(length)] for length in (9, 24, 50)]
    return [_make_request(rng, f"request-{i}", beginnings, max_tokens) for i in range(num_requests)]


def _make_request(rng: random.Random, request_id: str, beginnings: list[list[int]], max_tokens: int) -> Request:
    prompt = [rng.choice(VOCAB) for _ in range(rng.choice((1, 3, 7, 16, 33, 70)))]
    if rng.random() < 0.5:
        prompt = rng.choice(beginnings) + prompt
    kind = rng.choice(("greedy", "greedy", "sampled", "sampled", "penalties", "scored"))
    fields: dict[str, object] = {"temperature": 0.0}
    if kind in ("sampled", "penalties"):
        fields = {"temperature": rng.choice((0.5, 1.0)), "top_p": 0.9, "top_k": 40, "seed": rng.randrange(1000)}
    if kind == "penalties":
        fields |= {"repetition_penalty": 1.2, "presence_penalty": 0.3, "frequency_penalty": 0.1}
    if kind == "scored":
        fields["prompt_logprobs"] = True
    params = SamplingParams(
        max_tokens=rng.randrange(1, max_tokens + 1),
        ignore_eos=True,
        stop_token_ids=(rng.choice(VOCAB),) if rng.random() < 0.1 else (),
        num_logprobs=rng.choice((0, 2)),
        **fields,  # type: ignore[arg-type]
    )
    return Request(
        id=request_id,
        prompt=prompt,
        params=params,
        n=rng.choice((1, 1, 1, 3)),
        priority=rng.choice((0, 0, 0, 1)),
        abort_after=rng.randrange(1, 40) if rng.random() < 0.15 else None,
    )


Transcript = list[list[tuple[object, ...]]]
"""For each sequence of a request: prompt's log probabilities, each token with its own, and how it ended."""


async def _serve(engine: Engine | Fleet, request: Request, *, request_id: str, may_leave: bool) -> Transcript:
    outputs: list[list[SequenceOutput]] = [[] for _ in range(request.n)]
    num_left = request.abort_after if may_leave else None
    if isinstance(engine, Fleet):
        stream = engine.generate(
            request_id=request_id,
            prompt_token_ids=request.prompt,
            params=request.params,
            n=request.n,
            priority=request.priority,
        )
    else:
        stream = generate(
            engine, request.prompt, request.params, n=request.n, priority=request.priority, request_id=request_id
        )
    async with contextlib.aclosing(stream):
        async for output in stream:
            outputs[output.index].append(output)
            if num_left is not None:
                num_left -= 1
                if num_left == 0:
                    break
    return [_transcript(sequence) for sequence in outputs]


def _transcript(outputs: Sequence[SequenceOutput]) -> list[tuple[object, ...]]:
    rows: list[tuple[object, ...]] = [tuple(output.prompt_logprobs or ()) for output in outputs[:1]]
    rows += [output.logprobs for output in outputs if output.logprobs]
    if outputs and outputs[-1].finish_reason is not None:
        rows.append((outputs[-1].finish_reason, outputs[-1].stop_reason, outputs[-1].error))
    return rows


def serve_all(engine: Engine | Fleet, requests: Sequence[Request]) -> dict[str, Transcript]:
    """What comes of ``requests`` when they are served together and nobody leaves, by request."""

    async def run() -> list[Transcript]:
        return await asyncio.gather(*(_serve(engine, r, request_id=r.id, may_leave=False) for r in requests))

    return {request.id: found for request, found in zip(requests, asyncio.run(run()), strict=True)}


def _check(request: Request, found: Transcript, expected: Transcript) -> None:
    for index, rows in enumerate(zip(found, expected, strict=True)):
        for at, (got, wanted) in enumerate(itertools.zip_longest(*rows)):
            assert got == wanted, f"row {at} of sequence {index} is {got}, not {wanted}: {request}"


class Load:
    """Serves ``requests`` over and over, in random order, and compares what comes of them with what is ``expected``."""

    def __init__(
        self,
        engine: Engine | Fleet,
        requests: Sequence[Request],
        expected: Mapping[str, Transcript],
        *,
        num_clients: int,
    ) -> None:
        self._engine = engine
        self._requests = requests
        self._expected = expected
        self._num_clients = num_clients
        self._stopping = False
        self._begun = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="load")
        self.num_served = 0
        """Requests answered in full."""
        self.num_left = 0
        """Requests that their client gave up."""

    def start(self) -> None:
        """Begin; returns when the first request is served."""
        self._thread.start()
        self._begun.wait()

    def stop(self) -> None:
        """Let the requests under way end. Raises what went wrong."""
        self._stopping = True
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            asyncio.run(self._run_clients())
        except BaseException as error:  # thread edge: stop() raises it
            self._error = error
        finally:
            self._begun.set()

    async def _run_clients(self) -> None:
        async with asyncio.TaskGroup() as group:
            for number in range(self._num_clients):
                group.create_task(self._run_client(number))

    async def _run_client(self, number: int) -> None:
        rng = random.Random(number)
        for count in itertools.count():
            request = rng.choice(self._requests)
            found = await _serve(self._engine, request, request_id=f"{number}-{count}", may_leave=True)
            expected = self._expected[request.id]
            if request.abort_after is None:
                _check(request, found, expected)
                self.num_served += 1
            else:
                _check(request, found, [e[: len(f)] for f, e in zip(found, expected, strict=True)])
                self.num_left += 1
            self._begun.set()
            if self._stopping:
                return


@contextlib.contextmanager
def load(
    engine: Engine | Fleet, requests: Sequence[Request], expected: Mapping[str, Transcript], *, num_clients: int = 8
) -> Iterator[Load]:
    """A load for the time of the block; every answer was as expected."""
    running = Load(engine, requests, expected, num_clients=num_clients)
    running.start()
    try:
        yield running
    finally:
        running.stop()
