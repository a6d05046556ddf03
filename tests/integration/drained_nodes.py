"""Part of ``ray_nodes.py``: nodes are emptied under load, and killed; the service goes on.

Prints one JSON object for each drain, and ``same`` if every output was as before.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
import uuid

import ray
from engines import even_layout, make_engine
from loads import Load, load, make_requests, serve_all
from ray._private.worker import global_worker
from ray.core.generated import autoscaler_pb2
from refactor_faults import refactor
from served import wait_until
from several_nodes import NativeHost, Nodes

from flexpipe_serve.config import KVConfig, ModelConfig, ServeArgs
from flexpipe_serve.engine.engine import Engine
from flexpipe_serve.pipeline.channel import CurveKeys
from flexpipe_serve.placement.drain import DrainRecord, DrainRequest
from flexpipe_serve.refactor.record import RefactorRequest

DEADLINE_S = float(os.environ.get("FLEXPIPE_DRAIN_SECONDS", "60"))
"""Far more than it takes, also on a busy machine; a drain ends when the node is empty."""


def preempt(node: str) -> None:
    """What an autoscaler says of a node that the cloud takes back."""
    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    deadline_ms = int((time.time() + DEADLINE_S) * 1000)
    is_accepted, why = global_worker.gcs_client.drain_node(node, reason, "taken back", deadline_ms)
    assert is_accepted, why


def wait_until_over(engine: Engine, node: str) -> DrainRecord:
    def over() -> DrainRecord | None:
        return next((record for record in engine.drains() if record.node == node and record.is_over), None)

    record = wait_until(over, timeout_s=90, what="an empty node")
    assert isinstance(record, DrainRecord)
    return record


def nodes_of(engine: Engine) -> list[str]:
    """The nodes of the stages in pipeline order."""
    assert engine.layout is not None
    return [engine._pipeline.node_of[name] for name in engine.layout.stages]


def report(engine: Engine, record: DrainRecord, running: Load) -> None:
    refactorings = [found for name in record.refactorings if (found := engine.refactoring(name)) is not None]
    answer = {
        "state": record.state,
        "seconds": record.seconds,
        "early_s": (record.deadline_at or 0.0) - record.requested_at - record.seconds,
        "predicted_s": record.predicted_s,
        "modes": [found.mode for found in refactorings],
        "outcomes": [found.outcome for found in refactorings],
        "errors": [found.error for found in refactorings],
        "snapshot_bytes": sum(found.snapshot_bytes for found in refactorings),
        "num_stages_there": nodes_of(engine).count(record.node),
        "num_served": running.num_served,
    }
    print(json.dumps(answer), flush=True)


def go_on_without(engine: Engine, node: str, running: Load) -> None:
    """The node has ended, requests are answered as ever, and nobody noticed."""
    wait_until(
        lambda: not any(known["Alive"] for known in ray.nodes() if known["NodeID"] == node),
        timeout_s=60,
        what="the node's end",
    )
    num_served = running.num_served
    wait_until(lambda: running.num_served > num_served + 8, timeout_s=60, what="further answers")
    assert "stage_lost" not in [event.kind for event in engine.events()]


def run(model: str, nodes: Nodes) -> None:
    """The last part: two nodes end."""
    here, named, taken = nodes.here, nodes.near.node_id, nodes.far.node_id
    args = ServeArgs(
        model=ModelConfig(source=model), memory_budget=64 << 30, kv=KVConfig(block_size=4, max_tokens=2000)
    )
    engine, num_layers = make_engine(args, host=NativeHost(uuid.uuid4().hex), keys=CurveKeys.generate())
    try:
        engine._pipeline.place({"stage-0": here, "stage-1": named})
        engine.start(even_layout(num_layers, 2))
        if nodes_of(engine) != [here, named]:
            assert refactor(engine, RefactorRequest(stages=2, nodes=(here, named))).error is None
        requests = make_requests(random.Random(2), 12)
        expected = serve_all(engine, requests)
        with load(engine, requests, expected) as running:
            asyncio.run(engine.drain(DrainRequest(node=named, deadline_s=DEADLINE_S)))
            report(engine, wait_until_over(engine, named), running)
            nodes.cluster.remove_node(nodes.near, allow_graceful=False)
            go_on_without(engine, named, running)
            if taken not in nodes_of(engine):  # there was no time to start a stage there
                assert refactor(engine, RefactorRequest(stages=2, nodes=(here, taken))).error is None
            preempt(taken)
            report(engine, wait_until_over(engine, taken), running)
            go_on_without(engine, taken, running)  # Ray ends it once it is empty
        print("same", flush=True)
    finally:
        engine.stop()
