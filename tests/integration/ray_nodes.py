"""Run as a program: what needs several nodes, one after the other on one Ray cluster of its own.

Prints a line with the name of each part, and what the part has to say.
"""

from __future__ import annotations

import sys

import drained_nodes
import placed_nodes
import ray
import several_nodes
from ray.cluster_utils import Cluster

PARTS = {"several": several_nodes.run, "placed": placed_nodes.run, "drained": drained_nodes.run}
DEATH = {"health_check_initial_delay_ms": 1000, "health_check_period_ms": 500}
"""A killed node is found dead after five refused calls: 2.5 s rather than 15."""


def main(model: str) -> None:
    left, right = {"rack": "left"}, {"rack": "right"}
    head = {"num_cpus": 1, "include_dashboard": False, "labels": left, "_system_config": DEATH}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    far = cluster.add_node(num_cpus=1, labels=right)
    near = cluster.add_node(num_cpus=1, labels=left)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
    try:
        cluster.wait_for_nodes()
        nodes = several_nodes.Nodes(cluster, ray.get_runtime_context().get_node_id(), near, far)
        for name, run in PARTS.items():
            print(f"part {name}", flush=True)
            run(model, nodes)
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    main(sys.argv[1])
