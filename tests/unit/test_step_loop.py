"""The engine thread against a link made of queues: what it does in which order."""

from __future__ import annotations

import asyncio
import queue
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE

from flexpipe_serve.engine.outputs import SequenceOutput
from flexpipe_serve.engine.sampling_params import SamplingParams
from flexpipe_serve.engine.scheduler import Scheduler
from flexpipe_serve.engine.scheduler_config import SchedulerConfig
from flexpipe_serve.engine.step_loop import RetiredError, StepLoop
from flexpipe_serve.engine.stream import RequestStream, SequenceText, make_stream
from flexpipe_serve.errors import EngineUnavailableError
from flexpipe_serve.metrics import EngineMetrics
from flexpipe_serve.pipeline.messages import FailureHeader, Frame, ResultHeader, StepBatch, encode

WAIT_S = 10.0
LETTERS = "abcdefghijklmnopqrstuvwxyz"


class Link:
    """Every step is answered with the letter that the test says, when it says so."""

    epoch = 1

    def __init__(self) -> None:
        self.sent: queue.SimpleQueue[StepBatch] = queue.SimpleQueue()
        self.log: list[str] = []
        self.wakes = True
        self._answers: queue.SimpleQueue[Sequence[Frame] | None] = queue.SimpleQueue()

    def send(self, batch: StepBatch) -> None:
        self.log.append(f"sent {batch.header.step}")
        self.sent.put(batch)

    def receive(self, timeout_s: float) -> Sequence[Frame] | None:
        try:
            return self._answers.get(timeout=timeout_s)
        except queue.Empty:
            return None

    def wake(self) -> None:
        if self.wakes:
            self._answers.put(None)

    def answer(self, batch: StepBatch, letter: str) -> None:
        tokens = np.full(len(batch.header.samples), LETTERS.index(letter), np.int32)
        header = ResultHeader(epoch=self.epoch, step=batch.header.step, stage_seconds=(0.001,))
        self._answers.put(encode(header, tokens.data.cast("B")))

    def fail(self, batch: StepBatch) -> None:
        self._answers.put(encode(FailureHeader(epoch=1, step=batch.header.step, stage="stage-0", message="poison")))


@pytest.fixture
def backend() -> Tokenizer:
    tokenizer = Tokenizer(BPE(vocab={letter: i for i, letter in enumerate(LETTERS)}, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


@pytest.fixture
def link() -> Link:
    return Link()


@pytest.fixture
async def loop(link: Link) -> AsyncIterator[StepLoop]:
    config = SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=64, max_model_len=64, max_waiting=8)
    scheduler = Scheduler(config, num_blocks=64, block_size=4)
    made = StepLoop(link, scheduler, EngineMetrics(app="a", model="m"), num_cores=2)
    made.start()
    made.resume(depth=1, num_blocks=64).result(WAIT_S)
    yield made
    link.wakes = True
    made.stop("the test is over.")


async def add(loop: StepLoop, backend: Tokenizer, name: str = "r", **params: Any) -> RequestStream:
    stream = make_stream(
        request_id=name,
        prompt_token_ids=[1, 2, 3],
        params=SamplingParams(**{"max_tokens": 4, "ignore_eos": True, **params}),
        n=1,
        priority=0,
        eos_token_ids=[],
        backend=backend,
        now=time.monotonic(),
    )
    await asyncio.wrap_future(loop.add(stream))
    return stream


async def next_sent(link: Link) -> StepBatch:
    return await asyncio.to_thread(link.sent.get, timeout=WAIT_S)


async def read(stream: RequestStream) -> list[SequenceOutput]:
    return [output async for output in stream]


async def test_the_next_step_is_sent_before_the_text_of_the_last_is_made(
    loop: StepLoop, link: Link, backend: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = SequenceText.push

    def push(text: SequenceText, *args: Any) -> Any:
        link.log.append("text")
        return real(text, *args)

    monkeypatch.setattr(SequenceText, "push", push)
    stream = await add(loop, backend)
    for letter in "wxyz":
        link.answer(await next_sent(link), letter)
    outputs = await read(stream)
    assert "".join(output.text for output in outputs) == "wxyz"
    assert outputs[-1].finish_reason == "length"
    assert link.log == ["sent 1", "sent 2", "text", "sent 3", "text", "sent 4", "text", "text"]


async def test_a_sequence_that_a_stop_string_ends_is_in_no_further_step(
    loop: StepLoop, link: Link, backend: Tokenizer
) -> None:
    stream = await add(loop, backend, "stops", stop=("xy",), max_tokens=20)
    beside = await add(loop, backend, "goes on", max_tokens=20)
    sizes = []
    for letter in "wxyzzz":
        batch = await next_sent(link)
        sizes.append(batch.header.num_seqs)
        link.answer(batch, letter)
    outputs = await read(stream)
    assert "".join(output.text for output in outputs) == "w"
    assert (outputs[-1].finish_reason, outputs[-1].stop_reason) == ("stop", "xy")
    assert sizes[-1] == 1
    assert loop.scheduler.num_unfinished == 1
    await asyncio.wrap_future(loop.abort(beside))


async def test_an_abort_comes_behind_the_text_of_the_results_before_it(
    loop: StepLoop, link: Link, backend: Tokenizer
) -> None:
    stream = await add(loop, backend)
    batch = await next_sent(link)
    link.wakes = False
    aborted = loop.abort(stream)
    link.answer(batch, "w")  # it is taken while the abort waits
    await asyncio.wrap_future(aborted)
    outputs = await read(stream)
    assert "".join(output.text for output in outputs) == "w"
    assert outputs[-1].finish_reason == "abort"


async def test_a_step_that_fails_twice_ends_its_sequence(loop: StepLoop, link: Link, backend: Tokenizer) -> None:
    stream = await add(loop, backend)
    for _ in range(2):
        link.fail(await next_sent(link))
    outputs = await read(stream)
    assert outputs[-1].error == "computing it failed on stage-0: poison"


async def test_conditions_are_asked_between_steps_and_fail_at_a_rebuild(
    loop: StepLoop, link: Link, backend: Tokenizer
) -> None:
    stream = await add(loop, backend)
    batch = await next_sent(link)
    drained = loop.when(lambda: loop.last_sent(1) == 2)
    never = loop.when(lambda: False)
    assert not drained.done()
    link.answer(batch, "w")
    await asyncio.wait_for(asyncio.wrap_future(drained), WAIT_S)
    assert not never.done()
    assert loop.resume(depth=1, num_blocks=64).result(WAIT_S) == 1
    with pytest.raises(EngineUnavailableError, match="rebuilt meanwhile"):
        never.result(WAIT_S)
    await asyncio.wrap_future(loop.abort(stream))


async def test_a_loop_that_has_ended_keeps_nobody_waiting(loop: StepLoop, link: Link, backend: Tokenizer) -> None:
    """A request may be on its way to a pipeline that is taken away at this moment."""
    waiting = loop.when(lambda: False)
    loop.stop("the test is over.")
    for late in (waiting, loop.when(lambda: True), loop.call(lambda: 7)):
        with pytest.raises(RetiredError):
            late.result(WAIT_S)
    with pytest.raises(RetiredError):
        await asyncio.wait_for(add(loop, backend), WAIT_S)


async def test_a_request_behind_the_end_of_all_is_refused(loop: StepLoop, backend: Tokenizer) -> None:
    """Taken in before the thread ends, nobody would ever end it."""
    loop.call(lambda: loop._end_all("the test is over.")).result(WAIT_S)
    with pytest.raises(RetiredError):
        await asyncio.wait_for(add(loop, backend), WAIT_S)
