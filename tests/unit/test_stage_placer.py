"""What a pipeline tells the allocator, over a pipeline that only remembers where stages are to stand."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest

from flexpipe_serve.engine.stage_placer import StagePlacer
from flexpipe_serve.pipeline.budget import KVBudget
from flexpipe_serve.pipeline.layout import even_boundaries, make_layout
from flexpipe_serve.pipeline.stage_types import StageSetup
from flexpipe_serve.placement.nodes import usable_nodes
from flexpipe_serve.placement.placements import Placements
from flexpipe_serve.placement.topology import Device, DeviceKind, Node, Topology
from flexpipe_serve.refactor.feasibility import ModelWeights

GIB = 2**30
WEIGHTS = ModelWeights(layers=(GIB,) * 4, embedding=0, head=0)
_Notes = list[tuple[str, str]]


class FakePipeline:
    """On nodes with as many GiB each; asks for a block of 16 tokens in 1/8 GiB of each layer, twice."""

    def __init__(self, sizes: Mapping[str, int], *, key: str = "app", budget_bytes: int | None = None) -> None:
        self.setup = StageSetup(
            name="", domain_key=key, model_path="m", max_model_len=32, dtype="float32", device="cpu",
            attention="auto", block_size=16, max_blocks=100, num_work_tokens=16, orphan_timeout_s=5.0,
        )  # fmt: skip
        self.budget = KVBudget(budget_bytes=budget_bytes, block_bytes=GIB // 8, max_blocks=100)
        self.budgets: dict[str, int] = {}
        self.homes: dict[str, str] = {}
        self.router_node = next(iter(sizes))
        self._sizes = sizes

    def topology(self) -> Topology:
        return Topology(
            nodes=tuple(Node(name=name) for name in self._sizes),
            devices=tuple(
                Device(
                    name=name, node=name, kind=DeviceKind.CPU, compute=name, domain=name,
                    total_bytes=size * GIB, free_bytes=size * GIB,
                )
                for name, size in self._sizes.items()
            ),
        )  # fmt: skip

    def usable_nodes(self, topology: Topology) -> tuple[str, ...]:
        return usable_nodes(topology)

    def place(self, node_of: Mapping[str, str]) -> None:
        self.homes |= node_of


@pytest.fixture
def notes() -> _Notes:
    return []


@pytest.fixture
def place(notes: _Notes) -> Callable[..., dict[str, str]]:
    placements = Placements()

    def place(pipeline: FakePipeline, num_stages: int) -> dict[str, str]:
        placer = StagePlacer(pipeline, WEIGHTS, placements, note=lambda kind, text: notes.append((kind, text)))  # type: ignore[arg-type]
        boundaries = even_boundaries(num_layers=4, num_stages=num_stages)
        placer.place(make_layout(num_layers=4, boundaries=boundaries))
        placements.note(pipeline.setup.domain_key, pipeline.homes, at=0.0)
        return pipeline.homes

    return place


def test_on_a_single_node_nothing_is_chosen_and_nothing_said(
    place: Callable[..., dict[str, str]], notes: _Notes
) -> None:
    assert place(FakePipeline({"a": 1}), 2) == {}
    assert notes == []


def test_weights_kv_of_the_longest_and_the_process_must_fit_in_the_budget(
    place: Callable[..., dict[str, str]], notes: _Notes
) -> None:
    # Four layers of 1.25 GiB and three processes of half a GiB.
    assert set(place(FakePipeline({"a": 20, "b": 20}, budget_bytes=7 * GIB), 3).values()) == {"a"}
    assert set(place(FakePipeline({"a": 20, "b": 20}, budget_bytes=6 * GIB), 3).values()) == {"a", "b"}
    assert set(place(FakePipeline({"a": 10, "b": 5}), 3).values()) == {"a", "b"}, "60 % of what is free"
    assert notes == []


def test_what_has_a_node_keeps_it(place: Callable[..., dict[str, str]]) -> None:
    pipeline = FakePipeline({"a": 20, "b": 20})
    pipeline.homes = {"stage-1": "a", "stage-0": "b"}
    assert place(pipeline, 3) == {"stage-0": "b", "stage-1": "a", "stage-2": "a"}


def test_a_further_pipeline_has_its_share_of_a_node(place: Callable[..., dict[str, str]], notes: _Notes) -> None:
    sizes = {"a": 20, "b": 20}
    place(FakePipeline(sizes, budget_bytes=20 * GIB), 2)
    assert set(place(FakePipeline(sizes, key="app/p1-", budget_bytes=20 * GIB), 1).values()) <= {"a", "b"}
    assert notes == []
    assert place(FakePipeline(sizes, key="app/p2-", budget_bytes=10 * GIB), 1) == {}
    ((kind, text),) = notes
    assert kind == "placement_refused"
    assert "5.50 GiB" in text


def test_its_own_budget_counts_where_it_stands(place: Callable[..., dict[str, str]]) -> None:
    pipeline = FakePipeline({"a": 20, "b": 20}, budget_bytes=20 * GIB)
    pipeline.homes, pipeline.budgets = {"stage-0": "a", "stage-1": "a"}, {"a": 6 * GIB}
    assert place(pipeline, 3)["stage-2"] == "b", "others have the rest"
