"""What a split asks of the devices: the stages of a pipeline as demands for the allocator."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from flexpipe_serve.placement.allocation import StageDemand
from flexpipe_serve.planner.profile import ModelProfile, StepShape


def stage_demands(
    profile: ModelProfile,
    boundaries: Sequence[int],
    *,
    shape: StepShape,
    max_rate: float,
    num_kv_tokens: int,
    overhead_bytes: int,
    cv: float,
    pipeline: str = "p0",
) -> tuple[StageDemand, ...]:
    """The demands of a pipeline with these boundaries; stages are named ``PIPELINE/stage-0`` and so on.

    Args:
        shape: the step by which stages are compared.
        max_rate: requests a second that the pipeline sustains on devices of speed 1; its slowest stage's.
        num_kv_tokens: KV capacity; every stage holds its layers' part of it.
        overhead_bytes: of a stage's process.
        cv: of the gaps between the model's requests.
    """
    edges = (0, *boundaries, profile.num_layers)
    seconds = [profile.stage_seconds(start, stop, shape) for start, stop in pairwise(edges)]
    demands = []
    for index, (start, stop) in enumerate(pairwise(edges)):
        weights = profile.stage_bytes(start, stop)
        demands.append(
            StageDemand(
                name=f"{pipeline}/stage-{index}",
                model=profile.model,
                pipeline=pipeline,
                memory_bytes=weights + num_kv_tokens * profile.kv_bytes_per_token * (stop - start) + overhead_bytes,
                rate=max_rate * max(seconds) / seconds[index],
                cv=cv,
                setup_s=weights / profile.load_bytes_per_s,
            )
        )
    return tuple(demands)
