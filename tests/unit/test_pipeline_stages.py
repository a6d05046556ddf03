"""The Router's view of stages that come and go, with stages that answer when the test says so."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping
from concurrent.futures import Future

import pytest

from flexpipe_serve.errors import EngineUnavailableError
from flexpipe_serve.model.weight_sizes import WeightSizes
from flexpipe_serve.pipeline.budget import KVBudget
from flexpipe_serve.pipeline.channel import Endpoint
from flexpipe_serve.pipeline.layout import make_layout
from flexpipe_serve.pipeline.pipeline import Pipeline
from flexpipe_serve.pipeline.stage_types import Assignment, StageHandle, StageReport, StageSetup, stage_compute
from flexpipe_serve.placement.nodes import one_node_topology
from flexpipe_serve.placement.topology import DeviceKind, Topology


class SlowStage:
    """A stage that starts when told to."""

    def __init__(self, setup: StageSetup) -> None:
        self.name = setup.name
        self.setup = setup
        self.over: Future[None] = Future()
        self.node = "here"
        self.waiting: list[Future[StageReport]] = []
        self.is_up = False

    def report(self) -> Future[StageReport]:
        answer: Future[StageReport] = Future()
        self.waiting.append(answer)
        if self.is_up:
            self.come_up()
        return answer

    def come_up(self) -> None:
        self.is_up = True
        waiting, self.waiting = self.waiting, []
        for answer in waiting:
            answer.set_result(
                StageReport(
                    name=self.name, setup=self.setup, pid=1, node=self.node, device="cpu", domain="here",
                    compute=stage_compute(self.setup, node=self.node, device="cpu"), speed=1.0,
                    domain_free_bytes=0, endpoint=Endpoint("here", f"ipc://{self.name}"), epoch=0, start=0, stop=0,
                    weight_sizes=WeightSizes(), overhead_bytes=0, kv_bytes=0, num_blocks=0, num_steps=0,
                    busy_seconds=0.0,
                )
            )  # fmt: skip

    def watch(self) -> Future[None]:
        return self.over

    def stop(self) -> None:
        self.over.set_result(None)

    def prepare(self, assignment: Assignment, *, num_blocks: int, fresh: bool) -> Future[StageReport]:
        raise NotImplementedError

    def resize_kv(self, num_blocks: int, *, fresh: bool = False) -> Future[None]:
        raise NotImplementedError

    def wait_copied(self, epoch: int, *, through_step: int, timeout_s: float) -> Future[None]:
        raise NotImplementedError

    def release(self, epoch: int) -> Future[StageReport]:
        raise NotImplementedError


class SlowHost:
    node = "here"

    def __init__(self) -> None:
        self.stages: dict[str, SlowStage] = {}

    def launch(self, setup: StageSetup, *, node: str | None = None) -> StageHandle:
        self.stages[setup.name] = SlowStage(setup)
        return self.stages[setup.name]

    def topology(self, *, kind: DeviceKind) -> Topology:
        return one_node_topology(self.node, kind=kind)

    def read_drained(self) -> dict[str, float]:
        return {}

    def write_drained(self, deadlines: Mapping[str, float], /) -> None:
        raise NotImplementedError


@pytest.fixture
def host() -> SlowHost:
    return SlowHost()


@pytest.fixture
def lost() -> list[str]:
    return []


@pytest.fixture
def pipeline(host: SlowHost, lost: list[str]) -> Iterator[Pipeline]:
    setup = StageSetup(
        name="", domain_key=uuid.uuid4().hex, model_path="", max_model_len=16, dtype="float32", device="cpu",
        attention="auto", block_size=16, max_blocks=16, num_work_tokens=16, orphan_timeout_s=5.0,
    )  # fmt: skip
    budget = KVBudget(budget_bytes=None, block_bytes=1, max_blocks=16)
    pipeline = Pipeline(host, setup=setup, budget=budget, on_lost=lambda name, _: lost.append(name))
    yield pipeline
    pipeline.stop()


def test_a_stage_that_is_still_starting_keeps_no_report_waiting(host: SlowHost, pipeline: Pipeline) -> None:
    pipeline.launch("stage-0")
    host.stages["stage-0"].come_up()
    launch = pipeline.launch("stage-1")
    assert list(pipeline.reports()) == ["stage-0"]
    assert set(pipeline.stages) == {"stage-0", "stage-1"}
    host.stages["stage-1"].come_up()
    assert launch.result(0).name == "stage-1"
    assert set(pipeline.reports()) == {"stage-0", "stage-1"}


def test_launching_a_stage_that_is_there_starts_no_other(host: SlowHost, pipeline: Pipeline) -> None:
    pipeline.launch("stage-0")
    first = host.stages["stage-0"]
    again = pipeline.launch("stage-0")
    assert host.stages["stage-0"] is first
    assert not again.done()
    first.come_up()
    assert again.done()


def test_only_an_end_unasked_is_a_loss(host: SlowHost, pipeline: Pipeline, lost: list[str]) -> None:
    for name in ("stage-0", "stage-1"):
        pipeline.launch(name)
        host.stages[name].come_up()
    pipeline.end("stage-0")
    assert lost == []
    host.stages["stage-1"].over.set_exception(RuntimeError("killed"))
    assert lost == ["stage-1"]
    pipeline.forget("stage-1")
    with pytest.raises(EngineUnavailableError, match="stage-1"):
        pipeline.stage("stage-1")
    assert pipeline.reports() == {}


def test_an_epoch_is_never_given_twice(pipeline: Pipeline) -> None:
    epochs = [pipeline.new_epoch() for _ in range(3)]
    assert epochs == sorted(set(epochs))


@pytest.mark.parametrize(("nodes", "max_depth", "depth"), [
    (["a", "a", "a"], None, 1),
    (["a", "b", "a"], None, 2),
    (["a", "a", "a"], 2, 2),
    (["a", "b", "c"], 16, 3),
])  # fmt: skip
def test_as_many_steps_in_flight_as_devices_compute(
    host: SlowHost, pipeline: Pipeline, nodes: list[str], max_depth: int | None, depth: int
) -> None:
    pipeline._max_depth = max_depth
    for index, node in enumerate(nodes):
        pipeline.launch(f"stage-{index}")
        host.stages[f"stage-{index}"].node = node
        host.stages[f"stage-{index}"].come_up()
    assert pipeline.depth(make_layout(num_layers=6, boundaries=[2, 4])) == depth
