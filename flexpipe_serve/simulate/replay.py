"""A policy over a recorded trace, on made-up nodes of the profiled kind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from flexpipe_serve.bench.arrivals import Arrival
from flexpipe_serve.errors import ConfigError
from flexpipe_serve.planner.partition import best_boundaries
from flexpipe_serve.planner.policy import make_policy
from flexpipe_serve.planner.profile import ModelProfile, StepShape
from flexpipe_serve.planner.types import PlannerWeights, Split, StageDevice
from flexpipe_serve.simulate.result import SimulationResult
from flexpipe_serve.simulate.simulation import Simulation, SimulationConfig

PolicyName = Literal["gated", "flexpipe", "static"]
"""``static``: the split stays."""
_STAGE_OVERHEAD_BYTES = 400 << 20
"""A stage's process: about what one with torch takes."""
_TYPICAL = StepShape(num_tokens=8, num_samples=8, num_context_tokens=8 * 256)
"""What the first split is cut for, before anything is known."""


def replay(
    profile: ModelProfile,
    arrivals: Sequence[Arrival],
    *,
    policy: PolicyName,
    weights: PlannerWeights,
    num_nodes: int,
    memory_bytes: int,
    num_stages: int = 1,
) -> SimulationResult:
    """Run ``policy`` over ``arrivals``.

    Args:
        num_nodes: equal ones, each with one device like the profiled one.
        memory_bytes: each node's budget for weights, KV and processes.
        num_stages: to begin with, each on a node of its own.

    Raises:
        ConfigError: more stages than nodes, or the first split does not fit.
    """
    if not 1 <= num_stages <= num_nodes:
        raise ConfigError(f"{num_stages} stages on {num_nodes} nodes; give from one stage to one for each node.")
    devices = [_node(i, memory_bytes) for i in range(num_nodes)]
    boundaries = best_boundaries(profile, devices[:num_stages], _TYPICAL)
    if boundaries is None:
        raise ConfigError(
            f"{profile.model} has {profile.num_layers} layers and"
            f" {profile.stage_bytes(0, profile.num_layers) / 2**20:.0f} MiB of weights, which {num_stages} of the nodes"
            f" cannot hold: each has {memory_bytes / 2**20:.0f} MiB, of which a process takes"
            f" {_STAGE_OVERHEAD_BYTES / 2**20:.0f}. Begin with more stages, or give them more memory."
        )
    return Simulation(
        profile,
        arrivals,
        split=Split(boundaries=boundaries, devices=tuple(devices[:num_stages])),
        devices=devices,
        policy=None if policy == "static" else make_policy(policy, weights),
        config=SimulationConfig(horizon_s=weights.horizon_s),
    ).run()


def _node(index: int, memory_bytes: int) -> StageDevice:
    name = f"node-{index}"
    return StageDevice(
        name=name,
        node=name,
        compute=name,
        domain=name,
        memory_bytes=memory_bytes,
        overhead_bytes=_STAGE_OVERHEAD_BYTES,
    )
