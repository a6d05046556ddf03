"""The topology as Ray tells it now."""

from __future__ import annotations

import ray
from ray._private.state import state  # the public API does not tell draining nodes

from flexpipe_serve.placement.topology import DeviceKind, Topology, topology_from_ray


def read_topology(*, kind: DeviceKind) -> Topology:
    """The cluster of this process; takes about a millisecond. Deadlines are Unix time.

    A node is draining when Ray was told so: by its autoscaler (preemption, idleness), ``ray drain-node``, or a SIGTERM
    to the node. Such a node takes no new stage, and ends by itself when the last one has left it.
    """
    draining = {node: deadline_ms / 1000 or None for node, deadline_ms in state.get_draining_nodes().items()}
    return topology_from_ray(ray.nodes(), kind=kind, draining=draining)
