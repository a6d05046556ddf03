"""What is assumed of a stage's memory before it runs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from flexpipe_serve.model.weight_sizes import WeightSizes
from flexpipe_serve.pipeline.channel import Endpoint
from flexpipe_serve.pipeline.stage_types import StageReport, StageSetup
from flexpipe_serve.placement.topology import Device, DeviceKind, Node, Topology
from flexpipe_serve.refactor.expected import expect_report

SETUP = StageSetup(
    name="stage-0", domain_key="", model_path="", max_model_len=16, dtype="float32", device="cpu", attention="auto",
    block_size=16, max_blocks=16, num_work_tokens=16, orphan_timeout_s=5.0,
)  # fmt: skip


def report(name: str, *, node: str, device: str = "cpu", private: bool = False, **fields: int) -> StageReport:
    sizes = {"domain_free_bytes": 700, "overhead_bytes": 30, "kv_bytes": 50} | fields
    domain = f"{node}/{name}" if private else node if device == "cpu" else f"{node}/{device}"
    return StageReport(
        name=name, setup=replace(SETUP, name=name, private_kv=private), pid=1, node=node, device=device,
        compute=domain, speed=1.0, domain=domain, endpoint=Endpoint(node, "", ""), epoch=1, start=0, stop=3,
        num_blocks=4, num_steps=0, busy_seconds=0.0,
        weight_sizes=WeightSizes(embedding=100), **sizes,
    )  # fmt: skip


def topology(**free_bytes: int) -> Topology:
    devices = [
        Device(
            name=name, node=name, kind=DeviceKind.CPU, compute=name, domain=name, total_bytes=free, free_bytes=free
        )
        for name, free in free_bytes.items()
    ]  # fmt: skip
    return Topology(nodes=tuple(Node(name=name) for name in free_bytes), devices=tuple(devices))


HERE = report("stage-0", node="here")
LARGE = report("stage-1", node="there", overhead_bytes=90, domain_free_bytes=400)


@pytest.mark.parametrize(("node", "free_bytes"), [("here", 700), ("there", 400), ("new", 5000)])
def test_free_memory_is_measured_by_a_neighbour_or_what_ray_gives_out(node: str, free_bytes: int) -> None:
    expected = expect_report("stage-7", node=node, reports=[HERE, LARGE], topology=topology(here=1, there=2, new=5000))
    assert (expected.name, expected.node, expected.domain) == ("stage-7", node, node)
    assert expected.domain_free_bytes == free_bytes
    assert (expected.weights_bytes, expected.kv_bytes) == (0, 0)
    assert expected.overhead_bytes == 90  # as the largest of those that run


def test_a_stage_with_memory_of_its_own_gets_a_domain_of_its_own() -> None:
    private = report("stage-0", node="here", private=True)
    assert expect_report("stage-7", node="new", reports=[private], topology=topology(new=9)).domain == "new/stage-7"


def test_a_gpu_elsewhere_is_assumed_to_be_like_ours() -> None:
    ours = report("stage-0", node="here", device="cuda:0")
    expected = expect_report("stage-7", node="new", reports=[ours], topology=topology(new=9))
    assert (expected.domain, expected.domain_free_bytes) == ("new/cuda:0", 700 + 100 + 30 + 50)
