"""What the Router itself takes of a step: the engine's own loop against stages that answer at once."""

from __future__ import annotations

import asyncio
import collections
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from flexpipe_serve.engine.request import Sequence as EngineSequence
from flexpipe_serve.engine.sampling_params import SamplingParams
from flexpipe_serve.engine.scheduler import Scheduler
from flexpipe_serve.engine.scheduler_config import SchedulerConfig
from flexpipe_serve.engine.step_loop import StepLoop
from flexpipe_serve.engine.stream import RequestStream
from flexpipe_serve.metrics import EngineMetrics
from flexpipe_serve.model.tokenizer import ModelTokenizer
from flexpipe_serve.pipeline.messages import Frame, ResultHeader, StepBatch, encode

_NUM_SEQS = 8
_NUM_PROMPT_TOKENS, _NUM_OUTPUT_TOKENS = 16, 200
_BLOCK_SIZE = 16
_TOKEN = 100


def measure_router(path: Path, *, max_model_len: int) -> float:
    """Seconds between a step's result and the next step: taking the tokens in, text, scheduling. Mean over decode
    steps of 8 sequences; HTTP is not in it.

    Args:
        path: model folder, for its tokenizer.
    """
    num_output_tokens = min(_NUM_OUTPUT_TOKENS, max_model_len - _NUM_PROMPT_TOKENS)
    return asyncio.run(_run(path, max_model_len=max_model_len, num_output_tokens=num_output_tokens))


async def _run(path: Path, *, max_model_len: int, num_output_tokens: int) -> float:
    backend = ModelTokenizer(path).backend
    config = SchedulerConfig(
        max_num_seqs=_NUM_SEQS, max_num_batched_tokens=512, max_waiting=_NUM_SEQS, max_model_len=max_model_len
    )
    num_blocks = _NUM_SEQS * -(-max_model_len // _BLOCK_SIZE)
    link = _Echo()
    loop = StepLoop(
        link,
        Scheduler(config, num_blocks=num_blocks, block_size=_BLOCK_SIZE),
        EngineMetrics(app="profile", model=path.name),
        num_cores=1,
    )
    loop.start()
    try:
        streams = [_stream(index, num_output_tokens, backend=backend) for index in range(_NUM_SEQS)]
        await asyncio.gather(*(asyncio.wrap_future(loop.add(stream)) for stream in streams))
        started = time.perf_counter()
        await asyncio.wrap_future(loop.resume(depth=1, num_blocks=num_blocks))
        await asyncio.gather(*(_read(stream) for stream in streams))
        return (time.perf_counter() - started) / link.num_steps
    finally:
        await asyncio.to_thread(loop.stop, "measured")


def _stream(index: int, num_output_tokens: int, *, backend: object) -> RequestStream:
    sequence = EngineSequence(
        request_id=str(index),
        # All different, or they would share blocks.
        prompt_token_ids=[1 + index] * _NUM_PROMPT_TOKENS,
        params=SamplingParams(temperature=0.0, max_tokens=num_output_tokens, ignore_eos=True),
        arrival_time=time.monotonic(),
    )
    return RequestStream([sequence], backend=backend)  # type: ignore[arg-type]


async def _read(stream: RequestStream) -> None:
    async for _ in stream:
        pass


class _Echo:
    """A link whose steps are over when they are sent."""

    epoch = 1

    def __init__(self) -> None:
        self.num_steps = 0
        self._results: collections.deque[list[Frame]] = collections.deque()
        self._woken = threading.Event()

    def send(self, batch: StepBatch) -> None:
        self.num_steps += 1
        tokens = np.full(len(batch.header.samples), _TOKEN, np.int32)
        result = ResultHeader(epoch=self.epoch, step=batch.header.step, stage_seconds=(0.0,))
        self._results.append(encode(result, tokens.data.cast("B")))

    def receive(self, timeout_s: float) -> Sequence[Frame] | None:
        if self._results:
            return self._results.popleft()
        self._woken.wait(timeout_s)
        self._woken.clear()
        return None

    def wake(self) -> None:
        self._woken.set()
