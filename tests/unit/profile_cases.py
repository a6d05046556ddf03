"""Profiles and steps for tests of what measures and fits them."""

from __future__ import annotations

from typing import Any

import msgspec

from flexpipe_serve.planner.profile import Curve, ModelProfile

NUM_LAYERS = 6


def profile_of(**changes: Any) -> ModelProfile:
    """A made-up profile of a model with six layers; its curves bend."""
    profile = ModelProfile(
        model="made-up",
        dtype="float32",
        device="none",
        num_threads=2,
        versions={"torch": "0"},
        layer=Curve(counts=(1, 4, 16, 64, 256), seconds=(5e-4, 6e-4, 9e-4, 4e-3, 1.7e-2)),
        layer_scale=(1.0, 1.0, 1.5, 1.0, 1.0, 1.0),
        context_token_s=9e-8,
        pair_s=1.2e-8,
        embedding=Curve(counts=(1, 64), seconds=(1e-5, 6e-5)),
        head=Curve(counts=(1, 8, 32), seconds=(3e-3, 4e-3, 9e-3)),
        stage_s=2e-4,
        hop_s=4e-4,
        step_s=5e-4,
        layer_bytes=(1_000_000,) * NUM_LAYERS,
        embedding_bytes=3_000_000,
        head_bytes=3_000_000,
        kv_bytes_per_token=512,
        activation_bytes_per_token=256,
        load_bytes_per_s=4e8,
    )
    return msgspec.structs.replace(profile, **changes)
