"""Part of ``ray_nodes.py``: refactorings between nodes, over TCP with CURVE keys.

Prints one JSON object for each refactoring, and ``same`` if every output was as before.
"""

from __future__ import annotations

import dataclasses
import json
import random
import uuid
from dataclasses import dataclass
from typing import Any

from engines import even_layout, make_engine
from loads import load, make_requests, serve_all
from ray.cluster_utils import Cluster
from refactor_faults import refactor

from flexpipe_serve.config import KVConfig, ModelConfig, ServeArgs
from flexpipe_serve.pipeline.channel import CurveKeys
from flexpipe_serve.pipeline.ray_host import RayStageHost
from flexpipe_serve.pipeline.stage_types import StageHandle, StageSetup
from flexpipe_serve.refactor.record import RefactorRequest

NUM_LAYERS = 6


@dataclass(frozen=True)
class Nodes:
    """The head, one in its rack, and one in another; ids as Ray has them."""

    cluster: Cluster
    here: str
    near: Any
    far: Any


class NativeHost(RayStageHost):
    """With kernels that compute every row by itself."""

    def launch(self, setup: StageSetup, *, node: str | None = None) -> StageHandle:
        return super().launch(dataclasses.replace(setup, linear="native"), node=node)


def run(model: str, nodes: Nodes) -> None:
    here, there = nodes.here, nodes.near.node_id
    args = ServeArgs(
        model=ModelConfig(source=model), memory_budget=64 << 30, kv=KVConfig(block_size=4, max_tokens=2000)
    )
    engine, _ = make_engine(args, host=NativeHost(uuid.uuid4().hex), keys=CurveKeys.generate())
    try:
        engine._pipeline.place({"stage-0": here, "stage-1": there})
        engine.start(even_layout(NUM_LAYERS, 2))
        requests = make_requests(random.Random(2), 12)
        expected = serve_all(engine, requests)
        with load(engine, requests, expected):
            for boundaries in ((1,), (2, 4), ()):
                record = refactor(engine, RefactorRequest(boundaries=boundaries))
                is_here = {name: report.node == here for name, report in engine._pipeline.reports().items()}
                moves = [move.shared for move in record.plan.moves]
                print(
                    json.dumps(
                        {
                            "outcome": record.outcome,
                            "error": record.error,
                            "shared": moves,
                            "here": is_here,
                            "snapshot_bytes": record.snapshot_bytes,
                        }
                    ),
                    flush=True,
                )
        print("same")
    finally:
        engine.stop()
