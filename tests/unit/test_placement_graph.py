"""Markers of starts: they count where paths meet, and fade."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexpipe_serve.placement.affinity import AffinityWeights, Hosting, affinity
from flexpipe_serve.placement.resource_graph import Level, ResourceGraph, Vertex, path_of
from flexpipe_serve.placement.topology import Device, DeviceKind, Node, Topology

TOPOLOGY = Topology(
    nodes=(
        Node(name="a", rack="r0", zone="z"),
        Node(name="b", rack="r0", zone="z"),
        Node(name="c", rack="r1", zone="z"),
    ),
    devices=tuple(
        Device(
            name=f"{node}{i}",
            node=node,
            kind=DeviceKind.CUDA,
            compute=f"{node}{i}",
            domain=f"{node}{i}",
            total_bytes=1,
            free_bytes=1,
        )
        for node in "abc"
        for i in range(2)
    ),
)
PATHS = {device.name: path_of(TOPOLOGY, device.name) for device in TOPOLOGY.devices}
TIMES = st.floats(0, 1000)


def test_the_nearer_the_start_the_busier_the_path():
    graph = ResourceGraph()
    assert graph.congestion(PATHS["a0"], 5.0) == 0
    graph.mark(PATHS["a0"], 5.0)
    assert [graph.congestion(PATHS[d], 5.0) for d in ("a0", "a1", "b0", "c0")] == [1.875, 0.875, 0.375, 0.125]


def test_the_bottleneck_is_where_starts_meet():
    graph = ResourceGraph()
    for device in ("a0", "a1", "a0"):
        graph.mark(PATHS[device], 0.0)
    assert graph.bottleneck(PATHS["a0"], 0.0) == Vertex(Level.DEVICE, "a0")
    assert graph.bottleneck(PATHS["a1"], 0.0) == Vertex(Level.NODE, "a")
    assert graph.bottleneck(PATHS["b1"], 0.0) == Vertex(Level.RACK, "z/r0")
    assert graph.bottleneck(PATHS["c1"], 0.0) == Vertex(Level.CLUSTER, "")


@given(st.lists(st.tuples(st.sampled_from(sorted(PATHS)), TIMES), max_size=8), st.randoms(), st.floats(0.5, 50))
def test_congestion_is_the_sum_of_faded_markers_in_any_order(marks, random, later):
    now = max((at for _, at in marks), default=0.0) + later
    shuffled = list(marks)
    random.shuffle(shuffled)
    graph = ResourceGraph(decay_s=100)
    for device, at in shuffled:
        graph.mark(PATHS[device], at)
    weights = dict(zip(Level, (1, 0.5, 0.25, 0.125), strict=True))
    for path in PATHS.values():
        expected = sum(
            weights[vertex.level] * math.exp((at - now) / 100)
            for device, at in marks
            for vertex in path
            if vertex in PATHS[device]
        )
        # Faded ones are forgotten: each may have weighed a thousandth.
        assert graph.congestion(path, now) == pytest.approx(expected, abs=2e-3 * (1 + len(marks)))
        assert graph.congestion(path, now + 100) == pytest.approx(graph.congestion(path, now) / math.e)


def test_faded_markers_take_no_memory():
    graph = ResourceGraph(decay_s=1)
    for i in range(100):
        graph.mark([Vertex(Level.DEVICE, f"d{i}")], 10.0 * i)
    assert len(graph._loads) == 1


def hosting(last_used_at=0.0, devices=("d0", "d1"), cached_share=0.0):
    return Hosting(node="n", devices=frozenset(devices), last_used_at=last_used_at, cached_share=cached_share)


def test_affinity_is_equation_13():
    weights = AffinityWeights(recency=2.0, decay_per_s=0.01, device=0.3, cached=0.7)
    value = affinity(
        hosting(last_used_at=20.0, cached_share=0.5), at=70.0, available=["d1", "d2"], weights=weights
    )  # fmt: skip
    assert value == pytest.approx(2.0 * math.exp(-0.5) + 0.3 * 1 + 0.7 * 0.5)


@given(at=TIMES, ago=TIMES, more=st.floats(0.1, 1000), share=st.floats(0, 1))
def test_recently_used_hosts_with_free_devices_come_first(at, ago, more, share):
    weights = AffinityWeights()

    def value(**kwargs):
        return affinity(hosting(**kwargs), at=at, available=["d0", "d1"], weights=weights)

    recent = value(last_used_at=at - ago, cached_share=share)
    assert recent >= value(last_used_at=at - ago - more, cached_share=share)
    assert recent > value(last_used_at=at - ago, cached_share=share, devices=["d0", "other"])
    assert value(devices=["other"], last_used_at=at, cached_share=1.0) == 0
