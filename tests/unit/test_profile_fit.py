"""From measured steps to times, with measurements whose truth is known."""

import itertools

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from profile_cases import NUM_LAYERS, profile_of

from flexpipe_serve.model.profile_fit import MeasuredStep, fit_error, fit_times
from flexpipe_serve.planner.profile import Curve, ModelProfile, StepShape

TRUTH = profile_of()
LAYERS = [(0, NUM_LAYERS), (0, 3), (1, 4)]
SHAPES = [
    *(StepShape(num_tokens=num, num_samples=num, num_context_tokens=16 * num) for num in (1, 4, 16, 64)),
    *(StepShape(num_tokens=num, num_samples=1, num_pairs=num * (num + 1) / 2) for num in (16, 64, 256)),
    StepShape(num_tokens=4, num_samples=4, num_context_tokens=4000),
    StepShape(num_tokens=64, num_samples=1, num_pairs=40_000),
]
ENDS = [StepShape(num_tokens=num, num_samples=num) for num in (1, 8, 32, 64)]


def step_of(
    profile: ModelProfile, shape: StepShape, *, start: int, stop: int, is_first: bool = False, is_last: bool = False
) -> MeasuredStep:
    """What a stage takes whose times are exactly the profile's."""
    seconds = profile.stage_s + profile.layer_seconds(shape) * sum(profile.layer_scale[start:stop])
    seconds += profile.embedding.at(shape.num_tokens) if is_first else 0.0
    seconds += profile.head.at(shape.num_samples) if is_last else 0.0
    return MeasuredStep(start=start, stop=stop, is_first=is_first, is_last=is_last, shape=shape, seconds=seconds)


def steps_of(profile: ModelProfile) -> list[MeasuredStep]:
    """Enough to find every time."""
    steps = [step_of(profile, shape, start=a, stop=b) for (a, b), shape in itertools.product(LAYERS, SHAPES)]
    steps += [step_of(profile, shape, start=0, stop=0) for shape in ENDS[:1]]
    steps += [step_of(profile, shape, start=0, stop=0, is_first=True) for shape in (ENDS[0], ENDS[-1])]
    steps += [step_of(profile, shape, start=0, stop=0, is_last=True) for shape in ENDS[:3]]
    return steps


def fitted(steps: list[MeasuredStep]) -> ModelProfile:
    times = fit_times(steps, layer_scale=TRUTH.layer_scale)
    return profile_of(
        layer=times.layer,
        context_token_s=times.context_token_s,
        pair_s=times.pair_s,
        embedding=times.embedding,
        head=times.head,
        stage_s=times.stage_s,
    )


def test_exact_measurements_give_the_truth() -> None:
    found = fitted(steps_of(TRUTH))
    assert found.layer.counts == TRUTH.layer.counts
    assert found.layer.seconds == pytest.approx(TRUTH.layer.seconds)
    assert found.head.seconds == pytest.approx(TRUTH.head.seconds)
    assert found.embedding.seconds == pytest.approx(TRUTH.embedding.seconds)
    assert found.context_token_s == pytest.approx(TRUTH.context_token_s)
    assert found.pair_s == pytest.approx(TRUTH.pair_s)
    assert found.stage_s == pytest.approx(TRUTH.stage_s)


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.floats(0.5, 600),
    samples=st.floats(0.5, 90),
    context=st.floats(0, 1e5),
    pairs=st.floats(0, 1e5),
    stage=st.sampled_from([(0, 6, True, True), (0, 2, True, False), (2, 6, False, True), (3, 3, False, False)]),
)
def test_steps_between_and_beyond_the_points_are_fitted_as_they_are_predicted(
    tokens: float, samples: float, context: float, pairs: float, stage: tuple[int, int, bool, bool]
) -> None:
    """Also steps that lie on no point may be fitted: they agree with the truth, so nothing changes."""
    start, stop, is_first, is_last = stage
    shape = StepShape(num_tokens=tokens, num_samples=samples, num_context_tokens=context, num_pairs=pairs)
    step = step_of(TRUTH, shape, start=start, stop=stop, is_first=is_first, is_last=is_last)
    found = fitted([*steps_of(TRUTH), step])
    assert fit_error(found, [step]).max < 1e-6


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-0.05, 0.05), min_size=40, max_size=40))
def test_errors_of_the_measurements_do_not_grow(noise: list[float]) -> None:
    steps = [
        MeasuredStep(**{**vars(step), "seconds": step.seconds * (1 + part)})
        for step, part in zip(steps_of(TRUTH), itertools.cycle(noise))
    ]
    found = fitted(steps)
    unseen = [
        step_of(TRUTH, StepShape(num_tokens=30, num_samples=9, num_context_tokens=2000, num_pairs=900), start=0, stop=6,
                is_first=True, is_last=True),
        step_of(TRUTH, StepShape(num_tokens=3, num_samples=3, num_context_tokens=900), start=2, stop=6, is_last=True),
    ]  # fmt: skip
    assert fit_error(found, unseen).max < 0.25


def test_no_time_is_negative_whatever_was_measured() -> None:
    # More context is faster here, which only chance can make it.
    wrong = msgspec.structs.replace(TRUTH, context_token_s=0.0)
    steps = [
        MeasuredStep(**{**vars(step), "seconds": step.seconds * (0.9 if step.shape.num_context_tokens > 1000 else 1)})
        for step in steps_of(wrong)
    ]
    found = fitted(steps)
    assert found.context_token_s == 0.0
    assert min(found.layer.seconds) > 0


def test_more_tokens_never_take_less_time() -> None:
    """One kind of step was disturbed all the time."""
    steps = [
        MeasuredStep(**{**vars(step), "seconds": step.seconds * (3 if step.shape.num_tokens == 64 else 1)})
        for step in steps_of(profile_of(layer_scale=TRUTH.layer_scale))
    ]
    for curve in (fitted(steps).layer, fitted(steps).embedding, fitted(steps).head):
        assert list(curve.seconds) == sorted(curve.seconds)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_no_other_times_come_nearer(seed: int) -> None:
    """However the measurements are disturbed, changing the result a little makes it no better."""
    rng = np.random.default_rng(seed)
    steps = [MeasuredStep(**{**vars(step), "seconds": step.seconds * rng.uniform(0.5, 3)}) for step in steps_of(TRUTH)]
    found = fitted(steps)

    def loss(profile: ModelProfile) -> float:
        again = [
            step_of(profile, s.shape, start=s.start, stop=s.stop, is_first=s.is_first, is_last=s.is_last) for s in steps
        ]
        return sum((a.seconds / s.seconds - 1) ** 2 for a, s in zip(again, steps, strict=True))

    best = loss(found)
    for name in ("context_token_s", "pair_s", "stage_s"):
        for factor in (0.9, 1.1):
            changed = msgspec.structs.replace(found, **{name: getattr(found, name) * factor})
            assert loss(changed) >= best - 1e-9
    for name in ("layer", "embedding", "head"):
        curve = getattr(found, name)
        for factor in (0.9, 1.1):  # keeps the order of its points
            seconds = tuple(factor * each for each in curve.seconds)
            assert (
                loss(msgspec.structs.replace(found, **{name: Curve(counts=curve.counts, seconds=seconds)}))
                >= best - 1e-9
            )


def test_error_is_relative_to_what_was_measured() -> None:
    shape = StepShape(num_tokens=4, num_samples=4)
    steps = [step_of(TRUTH, shape, start=0, stop=6, is_first=True, is_last=True)] * 3
    slower = [
        MeasuredStep(**{**vars(step), "seconds": step.seconds * factor})
        for step, factor in zip(steps, (1, 2, 4), strict=True)
    ]
    error = fit_error(TRUTH, slower)
    assert error.num_steps == 3
    assert error.max == pytest.approx(0.75)
    assert error.mean == pytest.approx(np.mean([0, 0.5, 0.75]))
