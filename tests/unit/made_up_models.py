"""Made-up profiles and devices for tests of the planner and of the simulator."""

from __future__ import annotations

from collections.abc import Sequence

from flexpipe_serve.planner.profile import Curve, ModelProfile
from flexpipe_serve.planner.types import StageDevice

MIB = 2**20


def make_profile(
    layer_scale: Sequence[float] = (1.0,) * 12,
    *,
    layer_bytes: Sequence[int] | None = None,
    stage_s: float = 0.0005,
    hop_s: float = 0.0003,
    step_s: float = 0.0002,
    kv_bytes_per_token: int = 1024,
) -> ModelProfile:
    num_layers = len(layer_scale)
    return ModelProfile(
        model="made up",
        dtype="float32",
        device="none",
        num_threads=1,
        versions={},
        layer=Curve(counts=(1, 16, 128), seconds=(0.001, 0.002, 0.012)),
        layer_scale=tuple(layer_scale),
        context_token_s=1e-7,
        pair_s=1e-8,
        embedding=Curve(counts=(1, 128), seconds=(0.0001, 0.0005)),
        head=Curve(counts=(1, 16), seconds=(0.003, 0.005)),
        stage_s=stage_s,
        hop_s=hop_s,
        step_s=step_s,
        layer_bytes=tuple(layer_bytes) if layer_bytes is not None else (4 * MIB,) * num_layers,
        embedding_bytes=10 * MIB,
        head_bytes=12 * MIB,
        kv_bytes_per_token=kv_bytes_per_token,
        activation_bytes_per_token=2304,
        load_bytes_per_s=200 * MIB,
    )


def make_device(
    index: int,
    *,
    compute: str | None = None,
    domain: str | None = None,
    memory_bytes: int = 1024 * MIB,
    overhead_bytes: int = 0,
    speed: float = 1.0,
) -> StageDevice:
    """By default a node of its own."""
    return StageDevice(
        name=f"device-{index}",
        node=f"node-{index}",
        compute=compute or f"compute-{index}",
        domain=domain or f"domain-{index}",
        memory_bytes=memory_bytes,
        overhead_bytes=overhead_bytes,
        speed=speed,
    )
