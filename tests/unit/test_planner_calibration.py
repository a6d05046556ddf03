"""What the profile leaves out is found in the steps, and goes into all predictions alike."""

from __future__ import annotations

import random
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planner_cases import even_split, make_demand, make_device, make_profile

from flexpipe_serve.engine.step_samples import StepSamples
from flexpipe_serve.pipeline.messages import ResultHeader, StepBatch, StepHeader
from flexpipe_serve.planner.calibration import MeasuredStep, StepCalibration, apply
from flexpipe_serve.planner.latency import predict
from flexpipe_serve.planner.profile import ModelProfile, StepShape
from flexpipe_serve.planner.types import Calibration, Split

PROFILE = make_profile()


def some_shape(rng: random.Random, *, prompts: bool) -> StepShape:
    rows = rng.randint(1, 24)
    num_new = rng.choice([0, 0, 64, 256]) if prompts else 0
    return StepShape(
        num_tokens=rows + num_new,
        num_samples=rows + (num_new > 0),
        num_context_tokens=rows * rng.randint(50, 600),
        num_pairs=num_new * (num_new + 1) / 2,
    )


def measured(truth: ModelProfile, split: Split, shape: StepShape, *, noise: float = 1.0) -> MeasuredStep:
    """A step where ``truth`` is the profile that is right."""
    edges = (0, *split.boundaries, truth.num_layers)
    compute_s = sum(
        truth.stage_seconds(a, b, shape, speed=device.speed)
        for (a, b), device in zip(pairwise(edges), split.devices, strict=True)
    )
    return MeasuredStep(
        shape=shape,
        compute_s=compute_s * noise,
        outside_s=(split.num_stages * truth.hop_s + truth.step_s) * noise,
    )


def learnt(
    truth: ModelProfile, splits: list[Split], *, seed: int = 0, prompts: bool = True, noise: float = 0.1, num: int = 150
) -> StepCalibration:
    rng = random.Random(seed)
    calibration = StepCalibration()
    for split in splits:
        steps = [
            measured(truth, split, some_shape(rng, prompts=prompts), noise=rng.lognormvariate(0, noise))
            for _ in range(num)
        ]
        calibration.note(PROFILE, split, steps)
    return calibration


def step_s(profile: ModelProfile, split: Split, shape: StepShape) -> float:
    step = measured(profile, split, shape)
    assert step.outside_s is not None
    return step.compute_s + step.outside_s


def test_nothing_seen_changes_nothing() -> None:
    calibration = StepCalibration()
    assert calibration.calibrated(PROFILE) == PROFILE
    assert calibration.applied == Calibration()
    assert apply(Calibration(), PROFILE) == PROFILE


@settings(max_examples=12, deadline=None)
@given(
    st.builds(
        Calibration,
        compute=st.floats(0.3, 4.0),
        stage_s=st.floats(0, 0.002),
        sample_s=st.floats(0, 0.0005),
        hop=st.floats(0.3, 6.0),
        router=st.floats(0.3, 6.0),
    ),
    st.integers(1, 3),
    st.integers(0, 1000),
)
def test_steps_like_those_seen_are_predicted_well(conditions: Calibration, num_stages: int, seed: int) -> None:
    truth = apply(conditions, PROFILE)
    split = even_split(num_stages, shared=True)
    found = learnt(truth, [split], seed=seed).calibrated(PROFILE)
    rng = random.Random(seed + 1)
    errors = [
        abs(step_s(found, split, shape) / step_s(truth, split, shape) - 1)
        for shape in (some_shape(rng, prompts=True) for _ in range(50))
    ]
    assert np.mean(errors) < 0.1


def test_several_splits_tell_stages_from_layers() -> None:
    truth = apply(Calibration(compute=1.3, stage_s=0.0015, sample_s=0.0002, hop=3.0, router=1.5), PROFILE)
    splits = [even_split(n, shared=True) for n in (1, 3, 2)]
    found = learnt(truth, splits, noise=0.05)
    assert found.calibrated(PROFILE).hop_s == pytest.approx(truth.hop_s, rel=0.25)
    for split in splits:
        assert predict(found.calibrated(PROFILE), split, make_demand(1.0)).latency_s == pytest.approx(
            predict(truth, split, make_demand(1.0)).latency_s, rel=0.06
        )


@pytest.mark.parametrize("num_stages", [1, 2, 3])
def test_the_present_split_is_not_favoured(num_stages: int) -> None:
    """Whatever is measured on, candidates keep their order: stages on shared cores bring hops and no throughput."""
    truth = apply(Calibration(compute=1.5, sample_s=0.0003, hop=3.0, router=2.0), PROFILE)
    found = learnt(truth, [even_split(num_stages, shared=True)]).calibrated(PROFILE)
    demand = make_demand(0.8)
    told = [predict(found, even_split(n, shared=True), demand) for n in (1, 2, 3)]
    assert [p.latency_s for p in told] == sorted(p.latency_s for p in told)
    assert [-p.max_rate for p in told] == sorted(-p.max_rate for p in told)
    for n, prediction in zip((1, 2, 3), told, strict=True):
        right = predict(truth, even_split(n, shared=True), demand)
        assert prediction.tpot_s == pytest.approx(right.tpot_s, rel=0.12)


def test_a_profile_that_was_measured_under_load_is_mended_in_the_other_direction() -> None:
    truth = apply(Calibration(compute=0.4), PROFILE)
    found = learnt(truth, [even_split(1)], prompts=False)
    assert found.applied.compute == 1.0  # not asked for yet
    found.calibrated(PROFILE)
    assert found.applied.compute == pytest.approx(0.4, rel=0.05)


def test_disturbed_steps_hardly_count_and_new_conditions_do() -> None:
    calibration = learnt(PROFILE, [even_split(1)])
    rng = random.Random(5)
    split = even_split(1)
    usual = [measured(PROFILE, split, some_shape(rng, prompts=False)) for _ in range(60)]
    calibration.note(PROFILE, split, [*usual, measured(PROFILE, split, usual[0].shape, noise=200.0), *usual])
    shape = usual[0].shape
    assert step_s(calibration.calibrated(PROFILE), split, shape) == pytest.approx(
        step_s(PROFILE, split, shape), rel=0.04
    )
    slow = apply(Calibration(compute=2.0, router=2.0, hop=2.0), PROFILE)
    calibration.note(PROFILE, split, [measured(slow, split, some_shape(rng, prompts=True)) for _ in range(300)])
    assert step_s(calibration.calibrated(PROFILE), split, shape) == pytest.approx(step_s(slow, split, shape), rel=0.1)


def test_the_profile_is_the_same_object_until_conditions_have_moved() -> None:
    calibration = learnt(PROFILE, [even_split(2)])
    before = calibration.calibrated(PROFILE)
    rng = random.Random(1)
    shapes = [some_shape(rng, prompts=True) for _ in range(100)]
    calibration.note(PROFILE, even_split(2), [measured(before, even_split(2), s) for s in shapes])
    assert calibration.calibrated(PROFILE) is before
    slow = apply(Calibration(compute=1.2), PROFILE)
    calibration.note(PROFILE, even_split(2), [measured(slow, even_split(2), s) for s in shapes])
    assert calibration.calibrated(PROFILE) is not before
    other = make_profile(stage_s=0.001)  # of another measurement: begins anew
    assert calibration.calibrated(other) == other


def test_speed_counts_for_what_is_on_top() -> None:
    half = Split(boundaries=(15,), devices=(make_device(0, speed=0.5), make_device(1)))
    truth = apply(Calibration(stage_s=0.003), PROFILE)
    found = learnt(truth, [half], noise=0.02, num=600).calibrated(PROFILE)
    shape = StepShape(num_tokens=8, num_samples=8, num_context_tokens=800)
    assert step_s(found, half, shape) == pytest.approx(step_s(truth, half, shape), rel=0.05)


# ------------------------------------------------------------------ what the engine notes


def batch_of(num_new: list[int], num_computed: list[int]) -> StepBatch:
    nothing = np.zeros(0, np.int32)
    return StepBatch(
        header=StepHeader(epoch=1, step=1, num_seqs=len(num_new), num_tokens=sum(num_new), table_width=0),
        token_ids=nothing,
        num_computed=np.array(num_computed, np.int32),
        num_new=np.array(num_new, np.int32),
        block_tables=nothing,
        histories=nothing,
        targets=nothing,
    )


def result(*, epoch: int = 1, held_seconds: float = 0.0) -> ResultHeader:
    return ResultHeader(epoch=epoch, step=1, stage_seconds=(0.01, 0.02), held_seconds=held_seconds)


def test_samples_are_taken_once_and_only_of_the_epoch_in_force() -> None:
    samples = StepSamples()
    batch = batch_of([1, 1, 10], [99, 49, 20])
    samples.note(batch, result(), seconds=0.05)
    samples.note(batch, result(), seconds=None)
    samples.note(batch, result(epoch=2), seconds=0.05)
    samples.note(batch, result(held_seconds=0.001), seconds=0.05)
    first, second = samples.take(epoch=1)
    assert (first.compute_s, first.outside_s) == (pytest.approx(0.03), pytest.approx(0.02))
    assert second.outside_s is None
    assert first.shape == StepShape(num_tokens=12, num_samples=0, num_context_tokens=150, num_pairs=10 * 20 + 55)
    assert samples.take(epoch=1) == samples.take(epoch=2) == []


def test_only_the_latest_samples_are_kept() -> None:
    samples = StepSamples()
    for _ in range(1000):
        samples.note(batch_of([1], [5]), result(), seconds=0.05)
    assert 20 < len(samples.take(epoch=1)) <= 200
