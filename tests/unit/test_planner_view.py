"""The pipeline as the planner sees it."""

from __future__ import annotations

from flexpipe_serve.engine.planner_view import join_views, make_view, nodes_of, own_computes
from flexpipe_serve.engine.scheduler_config import SchedulerStats
from flexpipe_serve.model.weight_sizes import WeightSizes
from flexpipe_serve.pipeline.channel import Endpoint
from flexpipe_serve.pipeline.layout import make_layout
from flexpipe_serve.pipeline.stage_types import StageReport, StageSetup
from flexpipe_serve.planner.types import SchedulerLimits, Split, StageDevice

STATS = SchedulerStats(
    num_running=3,
    num_waiting=2,
    num_steps_in_flight=1,
    num_blocks=100,
    num_free_blocks=60,
    num_cached_blocks=30,
    num_used_blocks=10,
    num_preemptions=0,
    num_prompt_tokens=50,
    num_prefix_hit_tokens=5,
)


def report(name: str, *, node: str = "a", compute: str = "a", domain: str = "a", overhead: int = 7) -> StageReport:
    setup = StageSetup(
        name=name,
        domain_key="k",
        model_path="m",
        max_model_len=8,
        dtype="float32",
        device="cpu",
        attention="auto",
        block_size=4,
        max_blocks=8,
        num_work_tokens=8,
        orphan_timeout_s=5,
    )
    return StageReport(
        name=name,
        setup=setup,
        pid=1,
        node=node,
        device="cpu",
        compute=compute,
        speed=1.0,
        domain=domain,
        domain_free_bytes=0,
        endpoint=Endpoint(node=node, ipc=""),
        epoch=1,
        start=0,
        stop=1,
        weight_sizes=WeightSizes(embedding=1),
        overhead_bytes=overhead,
        kv_bytes=1,
        num_blocks=100,
        num_steps=0,
        busy_seconds=0.0,
    )


def view_of(reports: list[StageReport], budgets: dict[str, int], *, boundaries: tuple[int, ...] = (2,)):
    return make_view(
        layout=make_layout(num_layers=4, boundaries=boundaries),
        reports={r.name: r for r in reports},
        budgets=budgets,
        stats=STATS,
        block_size=4,
        is_changing=False,
        limits=SchedulerLimits(max_num_seqs=3, max_num_batched_tokens=7),
    )


def test_stages_of_one_node_stand_on_one_device() -> None:
    view = view_of([report("stage-0"), report("stage-1", overhead=9), report("stage-2")], {"a": 1000})
    assert view is not None
    assert view.limits == SchedulerLimits(max_num_seqs=3, max_num_batched_tokens=7)
    (device,) = view.devices
    assert view.split.devices == (device, device)
    assert (device.memory_bytes, device.overhead_bytes) == (1000, 9), "room is needed for the largest"
    assert (view.num_kv_tokens_in_use, view.num_kv_tokens) == (40, 400)


def test_private_memory_and_own_cores_make_devices_apart() -> None:
    view = view_of(
        [report("stage-0", domain="a/stage-0"), report("stage-1", domain="a/stage-1", compute="a:1")],
        {"a/stage-0": 10, "a/stage-1": 20},
    )
    assert view is not None
    assert view.limits == SchedulerLimits(max_num_seqs=3, max_num_batched_tokens=7)
    assert [d.memory_bytes for d in view.split.devices] == [10, 20]
    assert len(view.devices) == 2
    assert [d.compute for d in view.split.devices] == ["a", "a:1"]


def test_a_stage_that_has_not_reported_makes_no_view() -> None:
    assert view_of([report("stage-0")], {"a": 1}) is None
    assert view_of([report("stage-0"), report("stage-1", domain="new")], {"a": 1}) is None, "no budget is known yet"


def test_pipelines_of_one_node_share_its_memory() -> None:
    first = view_of([report("stage-0"), report("stage-1")], {"a": 600})
    second = view_of([report("p1-stage-0"), report("stage-0"), report("stage-1")], {"a": 400})
    assert first is not None
    assert second is not None
    joined = join_views([first, second])
    assert [device.memory_bytes for device in joined.devices] == [1000]
    assert [device.memory_bytes for device in joined.split.devices] == [1000] * 4
    assert (joined.split.num_pipelines, joined.split.boundaries) == (2, (2,))
    assert (joined.num_waiting, joined.num_kv_tokens) == (4, 800)
    assert join_views([first]) is first


def test_nodes_are_named_only_where_there_is_a_choice() -> None:
    def split(*nodes: str) -> Split:
        devices = tuple(StageDevice(name=node, node=node, compute=node, domain=node, memory_bytes=1) for node in nodes)
        return Split(boundaries=tuple(range(1, len(nodes))), devices=devices)

    assert nodes_of(split("a", "a"), known=["a"]) is None
    assert nodes_of(split("a", "b"), known=["a", "b"]) == ("a", "b")
    assert nodes_of(split("b"), known=["a", "b"]) == ("b",)
    assert nodes_of(split("a", "a"), known=["a", "b"]) == ("a", "a"), "not where else stages might be placed"
    several = Split(boundaries=(), devices=split("a", "b").devices, num_pipelines=2)
    assert nodes_of(several, known=["a", "b"]) == ("a",)


def test_pipelines_that_take_turns_with_others_are_known() -> None:
    def split(*computes: str) -> Split:
        devices = tuple(StageDevice(name=name, node="a", compute=name, domain="a", memory_bytes=1) for name in computes)
        return Split(boundaries=tuple(range(1, len(computes))), devices=devices)

    assert own_computes([split("a", "a"), split("b", "c")]) == [True, True]
    assert own_computes([split("a", "b"), split("b", "c"), split("d")]) == [False, False, True]
    assert own_computes([]) == []
