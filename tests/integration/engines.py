"""Engines over stages in threads, and running many requests through one."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from flexpipe_serve.config import KVConfig, LimitsConfig, ModelConfig, SchedulerArgs, ServeArgs
from flexpipe_serve.engine.assemble import make_engine_maker
from flexpipe_serve.engine.engine import Engine
from flexpipe_serve.engine.outputs import SequenceOutput
from flexpipe_serve.engine.sampling_params import SamplingParams
from flexpipe_serve.engine.stream import make_stream
from flexpipe_serve.metrics import EngineMetrics
from flexpipe_serve.pipeline.channel import CurveKeys
from flexpipe_serve.pipeline.layout import Layout, even_boundaries, make_layout
from flexpipe_serve.pipeline.local_host import LocalStageHost
from flexpipe_serve.pipeline.stage_types import StageHandle, StageHost, StageSetup


class LinearHost(LocalStageHost):
    """Stages in threads with one kind of linear map: 'native' ones compute every row by itself; the bits of the 'plain'
    ones, which are torch's own, depend on what else is in a step."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self._kind = kind

    def launch(self, setup: StageSetup, *, node: str | None = None) -> StageHandle:
        return super().launch(replace(setup, linear=self._kind), node=node)


def even_layout(num_layers: int, num_stages: int) -> Layout:
    """Layers split evenly."""
    return make_layout(num_layers=num_layers, boundaries=even_boundaries(num_layers=num_layers, num_stages=num_stages))


def make_engine(
    args: ServeArgs, *, host: StageHost, limits: LimitsConfig | None = None, keys: CurveKeys | None = None
) -> tuple[Engine, int]:
    """The engine of an only pipeline, not started yet, and the model's number of layers.

    Args:
        keys: of stages on several nodes.
    """
    maker = make_engine_maker(
        args,
        host=host,
        domain_key=uuid.uuid4().hex,
        device="cpu",
        num_cores=2,
        limits=limits or LimitsConfig(),
        keys=keys,
    )
    return maker.make(0, metrics=EngineMetrics(app="test", model="test")), maker.num_layers


@contextlib.contextmanager
def running_engine(
    folder: Path,
    *,
    num_stages: int = 1,
    boundaries: Sequence[int] | None = None,
    host: StageHost | None = None,
    private_kv: bool = False,
    attention: Literal["auto", "torch"] = "auto",
    memory_budget: int | dict[str, int] = 64 << 30,
    block_size: int = 16,
    max_tokens: int = 65536,
    max_num_batched_tokens: int = 256,
    max_num_seqs: int = 64,
    max_waiting: int = 256,
    prefix_cache: bool = True,
) -> Iterator[Engine]:
    """A started engine; everything it held is gone afterwards. Its stages are split evenly, or at ``boundaries``."""
    args = ServeArgs(
        model=ModelConfig(source=str(folder)),
        memory_budget=memory_budget,  # type: ignore[arg-type]
        attention=attention,
        kv=KVConfig(
            block_size=block_size,
            max_tokens=max_tokens,
            prefix_cache=prefix_cache,
            domain="stage" if private_kv else "node",
        ),
        scheduler=SchedulerArgs(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            steps_in_flight=16,  # as many as stages, as on devices of their own
        ),
    )
    engine, num_layers = make_engine(args, host=host or LocalStageHost(), limits=LimitsConfig(max_waiting=max_waiting))
    if boundaries is None:
        boundaries = even_boundaries(num_layers=num_layers, num_stages=num_stages)
    engine.start(make_layout(num_layers=num_layers, boundaries=boundaries))
    try:
        yield engine
    finally:
        engine.stop()


async def generate(
    engine: Engine,
    prompt: Sequence[int],
    params: SamplingParams,
    *,
    n: int = 1,
    priority: int = 0,
    request_id: str | None = None,
) -> AsyncGenerator[SequenceOutput]:
    """A request's outputs, as a fleet of one pipeline serves it; closing the iterator is the client's leaving."""
    stream = make_stream(
        request_id=request_id or uuid.uuid4().hex,
        prompt_token_ids=prompt,
        params=params,
        n=n,
        priority=priority,
        eos_token_ids=engine.model.eos_token_ids,
        backend=engine.tokenizer.backend,
        now=time.monotonic(),
    )
    try:
        await asyncio.wrap_future(engine.loop.add(stream))
        async for output in stream:
            yield output
    finally:
        stream.leave()


async def collect(
    engine: Engine, prompt: Sequence[int], params: SamplingParams, *, n: int = 1, request_id: str | None = None
) -> list[list[SequenceOutput]]:
    """All outputs of a request, by sequence."""
    outputs: list[list[SequenceOutput]] = [[] for _ in range(n)]
    async with contextlib.aclosing(generate(engine, prompt, params, n=n, request_id=request_id)) as stream:
        async for output in stream:
            outputs[output.index].append(output)
    return outputs


def tokens_of(outputs: Sequence[SequenceOutput]) -> list[int]:
    """Token ids of one sequence."""
    return [token for output in outputs for token in output.token_ids]


def generate_all(engine: Engine, prompts: Sequence[Sequence[int]], params: SamplingParams) -> list[list[int]]:
    """Output tokens of all prompts, served together."""

    async def run() -> list[list[list[SequenceOutput]]]:
        return await asyncio.gather(*(collect(engine, prompt, params) for prompt in prompts))

    return [tokens_of(outputs[0]) for outputs in asyncio.run(run())]
