"""Part of ``ray_nodes.py``: stages that nobody names a node for, on a cluster with racks.

Prints one JSON object: the nodes of each pipeline's stages after each change, the events, and the tokens served.
"""

from __future__ import annotations

import asyncio
import json
import uuid

from engines import even_layout
from refactor_faults import refactor
from several_nodes import NUM_LAYERS, NativeHost, Nodes

from flexpipe_serve.config import KVConfig, LimitsConfig, ModelConfig, ServeArgs
from flexpipe_serve.engine.assemble import make_engine_maker
from flexpipe_serve.engine.fleet import Fleet
from flexpipe_serve.engine.sampling_params import SamplingParams
from flexpipe_serve.engine.scale_record import PipelineLayout, ScaleRequest
from flexpipe_serve.metrics import EngineMetrics
from flexpipe_serve.pipeline.channel import CurveKeys
from flexpipe_serve.refactor.record import RefactorRequest

BUDGET = 5 << 28
"""Two processes find room in it, not three."""


def nodes_of(fleet: Fleet, names: dict[str, str]) -> list[list[str]]:
    """Those of the stages of each pipeline, in order."""
    return [
        [names[engine._pipeline.node_of[stage]] for stage in engine.layout.stages]
        for engine in fleet.engines
        if engine.layout is not None
    ]


async def serve(fleet: Fleet) -> list[int]:
    params = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
    return [
        token
        async for output in fleet.generate(request_id=uuid.uuid4().hex, prompt_token_ids=[5, 6, 7], params=params)
        for token in output.token_ids
    ]


def run(model: str, nodes: Nodes) -> None:
    names = {nodes.here: "here", nodes.near.node_id: "near", nodes.far.node_id: "far"}
    args = ServeArgs(model=ModelConfig(source=model), memory_budget=BUDGET, kv=KVConfig(block_size=4, max_tokens=2000))
    maker = make_engine_maker(
        args,
        host=NativeHost(uuid.uuid4().hex),
        domain_key=uuid.uuid4().hex,
        device="cpu",
        num_cores=2,
        limits=LimitsConfig(),
        keys=CurveKeys.generate(),
    )
    fleet = Fleet(maker, make_metrics=lambda number: EngineMetrics(app="test", model="test", pipeline=number))
    try:
        fleet.start(even_layout(NUM_LAYERS, 2))
        tokens = [asyncio.run(serve(fleet))]
        started = nodes_of(fleet, names)
        one_more = ScaleRequest(layouts=(PipelineLayout(boundaries=(3,)), PipelineLayout(stages=1)))
        asyncio.run(fleet.scale(one_more))
        scaled = nodes_of(fleet, names)
        record = refactor(fleet.engines[0], RefactorRequest(stages=3))
        tokens.append(asyncio.run(serve(fleet)))
        print(
            json.dumps(
                {
                    "started": started,
                    "scaled": scaled,
                    "refactored": nodes_of(fleet, names),
                    "error": record.error,
                    "events": [event.kind for event in fleet.events()],
                    "tokens": tokens,
                }
            ),
            flush=True,
        )
    finally:
        fleet.stop()
