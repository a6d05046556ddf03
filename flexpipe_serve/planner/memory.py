"""Which devices a split's pipelines stand on, and what KV their memory leaves room for: pure code (P2, P3)."""

from __future__ import annotations

from collections import defaultdict

from flexpipe_serve.planner.profile import ModelProfile
from flexpipe_serve.planner.types import Split, StageDevice


def slices_of(boundaries: tuple[int, ...], num_layers: int) -> list[tuple[int, int]]:
    """First layer and the one after the last, of each stage."""
    return list(zip((0, *boundaries), (*boundaries, num_layers), strict=True))


def pipelines_of(split: Split) -> list[tuple[StageDevice, ...]]:
    """The devices of each pipeline that is named: of all, or only of the first where the others have such devices of
    their own."""
    size = split.num_stages
    return [split.devices[i : i + size] for i in range(0, len(split.devices), size)]


def num_kv_tokens(profile: ModelProfile, split: Split) -> int:
    """Tokens whose KV fits one pipeline: in the domain with the least room, beside weights and processes.

    Pipelines that share a domain share what is left of it. At least 0.
    """
    free: dict[str, int] = {}
    num_layers: dict[str, int] = defaultdict(int)
    slices = slices_of(split.boundaries, profile.num_layers)
    for devices in pipelines_of(split):
        for device, (start, stop) in zip(devices, slices, strict=True):
            taken = profile.stage_bytes(start, stop) + device.overhead_bytes
            free[device.domain] = free.get(device.domain, device.memory_bytes) - taken
            num_layers[device.domain] += stop - start
    return max(0, min(free[d] // (num_layers[d] * profile.kv_bytes_per_token) for d in free))
