"""Stages of a split as demands."""

import pytest

from flexpipe_serve.placement.demands import stage_demands
from flexpipe_serve.planner.profile import Curve, ModelProfile, StepShape

PROFILE = ModelProfile(
    model="m",
    dtype="float32",
    device="cpu",
    num_threads=1,
    versions={},
    layer=Curve(counts=(1.0,), seconds=(0.01,)),
    layer_scale=(1.0, 1.0, 2.0, 1.0),
    context_token_s=0.0,
    pair_s=0.0,
    embedding=Curve(counts=(1.0,), seconds=(0.0,)),
    head=Curve(counts=(1.0,), seconds=(0.02,)),
    stage_s=0.0,
    hop_s=0.0,
    step_s=0.0,
    layer_bytes=(100, 100, 200, 100),
    embedding_bytes=50,
    head_bytes=70,
    kv_bytes_per_token=3,
    activation_bytes_per_token=1,
    load_bytes_per_s=10.0,
)


def test_memory_rate_and_setup_of_each_stage():
    first, middle, last = stage_demands(
        PROFILE,
        (1, 2),
        shape=StepShape(num_tokens=1, num_samples=1),
        max_rate=2.0,
        num_kv_tokens=10,
        overhead_bytes=1000,
        cv=4.0,
        pipeline="p3",
    )
    assert [d.name for d in (first, middle, last)] == ["p3/stage-0", "p3/stage-1", "p3/stage-2"]
    assert {(d.model, d.pipeline, d.cv) for d in (first, middle, last)} == {("m", "p3", 4.0)}
    # Embedding, layers and head; KV of each stage's layers; the process.
    assert [d.memory_bytes for d in (first, middle, last)] == [150 + 30 + 1000, 100 + 30 + 1000, 370 + 60 + 1000]
    # The last stage takes five times as long as the others and is what the pipeline's rate comes from.
    assert [d.rate for d in (first, middle, last)] == pytest.approx([10.0, 10.0, 2.0])
    assert [d.setup_s for d in (first, middle, last)] == pytest.approx([15.0, 10.0, 37.0])
