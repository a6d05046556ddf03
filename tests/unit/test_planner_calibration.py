"""What the profile leaves out is found in the steps, and goes into all predictions alike: no cut is favoured."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
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
from flexpipe_serve.planner.partition import best_boundaries
from flexpipe_serve.planner.profile import StepShape
from flexpipe_serve.planner.step_times import StepTimes
from flexpipe_serve.planner.types import Calibration, Split

PROFILE = make_profile()
TWO = even_split(2, shared=True)
SHAPES = st.builds(
    lambda rows, chunk: StepShape(
        num_tokens=rows + chunk, num_samples=rows, num_context_tokens=200 * rows, num_pairs=chunk**2 / 2
    ),
    st.integers(1, 64),
    st.sampled_from([0, 64, 448]),
)


def some_shape(rng: random.Random, *, prompts: bool) -> StepShape:
    rows = rng.randint(1, 24)
    num_new = rng.choice([0, 0, 64, 256]) if prompts else 0
    return StepShape(
        num_tokens=rows + num_new,
        num_samples=rows + (num_new > 0),
        num_context_tokens=rows * rng.randint(50, 600),
        num_pairs=num_new * (num_new + 1) / 2,
    )


def measured(split: Split, shape: StepShape, *, compute: float = 1.0, messages: float = 1.0) -> MeasuredStep:
    """A step that takes so many times what the profile says."""
    edges = (0, *split.boundaries, PROFILE.num_layers)
    compute_s = sum(
        PROFILE.stage_seconds(a, b, shape, speed=device.speed)
        for (a, b), device in zip(pairwise(edges), split.devices, strict=True)
    )
    messages_s = split.num_stages * PROFILE.hop_s + PROFILE.step_s
    return MeasuredStep(shape=shape, compute_s=compute * compute_s, outside_s=messages * messages_s)


def learnt(
    compute: Callable[[StepShape], float] = lambda shape: 1.0,
    *,
    messages: float = 1.0,
    split: Split = TWO,
    noise: float = 0.0,
    num: int = 300,
    seed: int = 0,
    prompts: bool = True,
) -> StepCalibration:
    """From steps of many sizes.

    Args:
        compute: by which steps take longer.
        noise: deviation of its logarithm.
    """
    rng = random.Random(seed)
    calibration = StepCalibration()
    for _ in range(num // 10):
        shapes = [some_shape(rng, prompts=prompts) for _ in range(10)]
        calibration.note(
            PROFILE,
            split,
            [measured(split, s, compute=compute(s) * rng.lognormvariate(0, noise), messages=messages) for s in shapes],
        )
    return calibration


def slowdown(calibration: StepCalibration, shape: StepShape, split: Split = TWO) -> float:
    """Predicted time of a step, in units of the profile's."""
    found = calibration.calibrated(PROFILE)
    return StepTimes(found, split).at(shape)[0] / StepTimes(PROFILE, split).at(shape)[0]


def test_nothing_seen_changes_nothing() -> None:
    calibration = StepCalibration()
    assert calibration.applied == Calibration()
    assert calibration.calibrated(PROFILE) is PROFILE
    assert apply(Calibration(), PROFILE) == PROFILE


@settings(max_examples=20, deadline=None)
@given(SHAPES, st.integers(1, 4), st.integers(0, 1000))
def test_steps_as_the_profile_says_change_nothing(shape: StepShape, num_stages: int, seed: int) -> None:
    calibration = learnt(split=even_split(num_stages, shared=True), seed=seed)
    assert slowdown(calibration, shape) == 1.0
    assert calibration.calibrated(PROFILE) is PROFILE


@settings(max_examples=20, deadline=None)
@given(SHAPES, st.floats(0.05, 0.4), st.integers(0, 1000))
def test_noise_moves_predictions_by_little(shape: StepShape, noise: float, seed: int) -> None:
    # A logarithm that varies by so much has a mean that is higher by noise**2 / 2.
    assert slowdown(learnt(noise=noise, seed=seed), shape) == pytest.approx(1.0, abs=0.05 + 0.4 * noise)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.floats(0.2, 5.0), SHAPES, SHAPES)
def test_few_steps_change_little(num: int, factor: float, shape: StepShape, other: StepShape) -> None:
    calibration = StepCalibration()
    calibration.note(PROFILE, TWO, [measured(TWO, shape, compute=factor, messages=factor)] * num)
    for each in (shape, other):
        assert abs(math.log(slowdown(calibration, each))) < 0.65 * min(math.log(3), abs(math.log(factor))) + 0.01


@settings(max_examples=20, deadline=None)
@given(st.floats(0.4, 4.0), st.integers(1, 4), SHAPES, st.integers(0, 1000))
def test_a_uniform_slow_down_is_found_and_goes_into_all_candidates_alike(
    factor: float, num_stages: int, shape: StepShape, seed: int
) -> None:
    """Also into steps of sizes that were not seen."""
    split = even_split(num_stages, shared=True)
    calibration = learnt(
        lambda shape: factor, messages=factor, split=split, noise=0.1, seed=seed, prompts=False, num=400
    )
    found = [slowdown(calibration, shape, even_split(n, shared=True)) for n in (1, 2, 3)]
    assert max(found) / min(found) < 1.06
    assert math.log(found[0]) == pytest.approx(math.log(factor), abs=0.03 + 0.2 * abs(math.log(factor)))


@settings(max_examples=20, deadline=None)
@given(st.floats(0.3, 5.0), st.floats(0.3, 5.0), st.floats(0, 0.5), st.integers(0, 1000), SHAPES)
def test_no_cut_comes_from_what_steps_took(
    short: float, long: float, noise: float, seed: int, shape: StepShape
) -> None:
    """However steps differ: what is best to cut under the profile stays best, also between unequal devices."""

    def factor(shape: StepShape) -> float:
        return short if shape.num_tokens < 32 else long

    found = learnt(factor, messages=long, noise=noise, seed=seed, num=60).calibrated(PROFILE)
    for devices in (TWO.devices, (make_device(0, speed=0.5), make_device(1))):
        assert best_boundaries(found, devices, shape) == best_boundaries(PROFILE, devices, shape)


def test_short_steps_that_suffer_more_are_told_from_long_ones() -> None:
    calibration = learnt(lambda shape: 1.8 if shape.num_tokens < 16 else 1.3, noise=0.3, num=600)
    for num_tokens, factor in ((2, 1.8), (8, 1.8), (64, 1.3), (256, 1.3), (4096, 1.3)):
        shape = StepShape(num_tokens=num_tokens, num_samples=min(64, num_tokens))
        assert slowdown(calibration, shape) == pytest.approx(factor, rel=0.12)


@settings(max_examples=10, deadline=None)
@given(st.sampled_from([1, 2, 8, 64, 512]), st.sampled_from([1, 2, 8, 64, 512]))
def test_much_of_one_kind_says_no_nonsense_of_another(seen: int, other: int) -> None:
    """A burst's steps were all alike; what they say of others lies between them and the profile."""
    calibration = StepCalibration()
    shape = StepShape(num_tokens=seen, num_samples=seen)
    for _ in range(20):
        calibration.note(PROFILE, TWO, [measured(TWO, shape, compute=1.5, messages=3.0)] * 20)
    found = calibration.calibrated(PROFILE).compute_factor
    assert found.at(seen) == pytest.approx(1.5, rel=0.03)
    assert 1.3 < found.at(other) < 1.53


@pytest.mark.parametrize("num_stages", [1, 2, 3])
def test_the_present_split_is_not_favoured(num_stages: int) -> None:
    """Whatever is measured on, candidates keep their order: stages on shared cores bring hops and no throughput."""
    split = even_split(num_stages, shared=True)
    found = learnt(lambda shape: 1.5, messages=3.0, split=split, noise=0.2).calibrated(PROFILE)
    told = [predict(found, even_split(n, shared=True), make_demand(0.8)) for n in (1, 2, 3)]
    assert [p.latency_s for p in told] == sorted(p.latency_s for p in told)
    assert [-p.max_rate for p in told] == sorted(-p.max_rate for p in told)


def test_a_step_that_was_disturbed_hardly_counts_and_new_conditions_do() -> None:
    calibration = learnt(noise=0.1)
    rng = random.Random(5)
    usual = [measured(TWO, some_shape(rng, prompts=False)) for _ in range(60)]
    shape = usual[0].shape
    calibration.note(PROFILE, TWO, [*usual, measured(TWO, shape, compute=200.0, messages=200.0), *usual])
    assert slowdown(calibration, shape) == pytest.approx(1.0, abs=0.04)
    for _ in range(30):
        shapes = [some_shape(rng, prompts=True) for _ in range(20)]
        calibration.note(PROFILE, TWO, [measured(TWO, s, compute=2.0, messages=2.0) for s in shapes])
    assert slowdown(calibration, shape) == pytest.approx(2.0, rel=0.1)


def test_the_profile_is_the_same_object_until_conditions_have_moved() -> None:
    calibration = learnt(lambda shape: 1.5)
    before = calibration.calibrated(PROFILE)
    rng = random.Random(1)
    shapes = [some_shape(rng, prompts=True) for _ in range(100)]
    calibration.note(PROFILE, TWO, [measured(TWO, s, compute=1.5) for s in shapes])
    assert calibration.calibrated(PROFILE) is before
    calibration.note(PROFILE, TWO, [measured(TWO, s, compute=2.0) for s in shapes])
    assert calibration.calibrated(PROFILE) is not before
    assert calibration.applied.num_steps == 500
    other = make_profile(stage_s=0.001)  # of another measurement: begins anew
    assert calibration.calibrated(other) is other


def test_a_devices_speed_is_known_already() -> None:
    half = Split(boundaries=(15,), devices=(make_device(0, speed=0.5), make_device(1)))
    assert slowdown(learnt(split=half), StepShape(num_tokens=8, num_samples=8), half) == 1.0


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


def test_only_the_latest_samples_of_a_size_are_kept() -> None:
    samples = StepSamples()
    for _ in range(5):
        samples.note(batch_of([100], [0]), result(), seconds=0.5)
    for _ in range(1000):
        samples.note(batch_of([1], [5]), result(), seconds=0.05)
    taken = samples.take(epoch=1)
    assert [step.shape.num_tokens for step in taken].count(100) == 5
    assert 20 < len(taken) <= 200
