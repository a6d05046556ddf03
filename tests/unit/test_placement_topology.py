"""The topology from what Ray tells, and what of it may be used."""

import pytest

from flexpipe_serve.errors import ConfigError
from flexpipe_serve.placement.topology import (
    Device,
    DeviceKind,
    Memory,
    Node,
    Topology,
    devices_for_planner,
    topology_from_ray,
)

RAY_NODES = [
    {
        "NodeID": "n0",
        "Alive": True,
        "NodeManagerAddress": "10.0.0.1",
        "Resources": {"CPU": 8.0, "memory": 64e9, "GPU": 2.0, "node:10.0.0.1": 1.0},
        "Labels": {"ray.io/node-id": "n0", "ray.io/availability-zone": "eu-1a", "rack": "r7"},
    },
    {"NodeID": "n1", "Alive": True, "NodeManagerAddress": "10.0.0.2", "Resources": {"CPU": 4.0}, "Labels": None},
    {"NodeID": "n2", "Alive": False, "NodeManagerAddress": "10.0.0.3", "Resources": {}, "Labels": {"zone": "z"}},
    {"NodeID": "n3", "Alive": True, "Resources": {"memory": 8e9, "GPU": 1.0}, "Labels": {"zone": "z"}},
]


def test_nodes_get_labels_and_state():
    topology = topology_from_ray(RAY_NODES, kind=DeviceKind.CPU, draining={"n3": 17.5})
    n0, n1, n2, n3 = topology.nodes
    assert (n0.address, n0.zone, n0.rack) == ("10.0.0.1", "eu-1a", "r7")
    assert (n1.zone, n1.rack, n1.is_usable) == ("", "", True)
    assert (n2.is_alive, n2.is_usable, n2.zone) == (False, False, "z")
    assert (n3.is_draining, n3.deadline, n3.is_usable) == (True, 17.5, False)
    assert topology.node("n3") is n3


def test_a_cpu_node_is_one_device_with_the_memory_that_ray_may_give_out_or_that_was_measured():
    topology = topology_from_ray(
        RAY_NODES,
        kind=DeviceKind.CPU,
        memory={"n1": Memory(total_bytes=10, free_bytes=4)},
        speeds={"n1": 0.5},
        draining={"n3": None},
    )
    assert [(d.name, d.domain, d.total_bytes, d.free_bytes, d.speed) for d in topology.devices] == [
        ("n0", "n0", 64 * 10**9, 64 * 10**9, 1.0),
        ("n1", "n1", 10, 4, 0.5),
        ("n3", "n3", 8 * 10**9, 8 * 10**9, 1.0),
    ]
    assert [d.name for d in topology.usable_devices] == ["n0", "n1"]
    assert [(d.name, d.node, d.memory_bytes, d.overhead_bytes) for d in devices_for_planner(topology)] == [
        ("n0", "n0", 64 * 10**9, 0),
        ("n1", "n1", 4, 0),
    ]
    assert {d.overhead_bytes for d in devices_for_planner(topology, overhead_bytes=3)} == {3}


def test_each_gpu_is_a_device_without_memory_until_it_is_measured():
    topology = topology_from_ray(
        RAY_NODES, kind=DeviceKind.CUDA, memory={"n0/cuda:1": Memory(total_bytes=80, free_bytes=79)}
    )
    assert [(d.name, d.node, d.total_bytes) for d in topology.devices] == [
        ("n0/cuda:0", "n0", 0),
        ("n0/cuda:1", "n0", 80),
        ("n3/cuda:0", "n3", 0),
    ]
    assert topology.device("n0/cuda:1").kind is DeviceKind.CUDA


def device(name, *, domain=None, total=100, free=100):
    return Device(
        name=name,
        node="n",
        kind=DeviceKind.CUDA,
        compute=name,
        domain=domain or name,
        total_bytes=total,
        free_bytes=free,
    )


def test_a_device_that_others_use_is_not_whole():
    assert device("d", free=100).is_whole
    assert device("d", free=99).is_whole
    assert not device("d", free=98).is_whole


@pytest.mark.parametrize(
    ("nodes", "devices", "message"),
    [
        (["n", "n"], [], "node 'n' occurs 2 times"),
        (["n"], [device("a"), device("a")], "device 'a' occurs 2 times"),
        (["m"], [device("a")], "stands on node 'n', which is not"),
        (["n"], [device("a", domain="x", free=1), device("b", domain="x", free=2)], r"\(100, 1\) and \(100, 2\)"),
    ],
)
def test_contradictions_are_refused(nodes, devices, message):
    with pytest.raises(ConfigError, match=message):
        Topology(nodes=tuple(Node(name=name) for name in nodes), devices=tuple(devices))
