"""The simulated server: times that are known, nobody is lost in a change, and what is held is counted."""

import math

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up_models import MIB, make_device, make_profile

from flexpipe_serve.bench.arrivals import Arrival, gamma_arrivals
from flexpipe_serve.errors import ConfigError
from flexpipe_serve.planner.cost import LoadPace
from flexpipe_serve.planner.profile import StepShape
from flexpipe_serve.planner.types import (
    CandidateScore,
    Decision,
    Prediction,
    SchedulerLimits,
    Split,
    Trigger,
    Verdict,
)
from flexpipe_serve.simulate.refactoring import RefactoringTimes
from flexpipe_serve.simulate.result import summarize
from flexpipe_serve.simulate.simulation import Simulation, SimulationConfig

PROFILE = make_profile()
DEVICES = tuple(make_device(i) for i in range(4))


def split_of(num_stages, *, num_pipelines=1, devices=DEVICES):
    boundaries = tuple(12 * i // num_stages for i in range(1, num_stages))
    return Split(boundaries=boundaries, devices=devices[: num_stages * num_pipelines], num_pipelines=num_pipelines)


def run(arrivals, split, *, profile=PROFILE, policy=None, **config):
    simulation = Simulation(
        profile, arrivals, split=split, devices=DEVICES, policy=policy, config=SimulationConfig(**config)
    )
    return simulation.run()


class Script:
    """Moves at given times, whatever comes."""

    def __init__(self, *moves):
        self.moves = list(moves)
        self.states = []

    def decide(self, profile, state):
        self.states.append(state)
        chosen = None
        if self.moves and state.now >= self.moves[0][0]:
            chosen = self.moves.pop(0)[1]
        prediction = Prediction(ttft_s=0, tpot_s=0, latency_s=0, max_rate=1, utilisation=0.5, num_kv_tokens=0)
        return Decision(
            at=state.now,
            policy="script",
            trigger=state.trigger,
            demand=state.demand,
            current=CandidateScore(split=state.current, prediction=prediction, score=0.0),
            candidates=(),
            verdict=Verdict.MOVE if chosen else Verdict.STAY,
            chosen=chosen,
            sentence="told to",
        )


def step_s(shape, split, profile=PROFILE):
    """Of one step through an idle pipeline."""
    edges = (0, *split.boundaries, profile.num_layers)
    stages = sum(
        profile.stage_seconds(a, b, shape, speed=d.speed)
        for d, a, b in zip(split.devices, edges[:-1], edges[1:], strict=True)
    )
    return stages + split.num_stages * profile.hop_s + profile.step_s


def prompt_shape(num_tokens, start=0, *, samples=1):
    return StepShape(
        num_tokens=num_tokens,
        num_samples=samples,
        num_pairs=num_tokens * start + num_tokens * (num_tokens + 1) / 2,
    )


def decode_shape(num_context):
    return StepShape(num_tokens=1, num_samples=1, num_context_tokens=num_context)


@pytest.mark.parametrize("num_stages", [1, 2, 4])
def test_one_request_takes_what_the_profile_says(num_stages):
    split = split_of(num_stages)
    (request,) = run([Arrival(2.0, 700, 4)], split).requests
    ttft = step_s(prompt_shape(512, samples=0), split) + step_s(prompt_shape(188, 512), split)
    assert request.ttft_s == pytest.approx(ttft)
    decodes = [step_s(decode_shape(700 + i), split) for i in (1, 2, 3)]
    assert request.latency_s == pytest.approx(ttft + sum(decodes))
    assert request.tpot_s == pytest.approx(sum(decodes) / 3)


def test_stages_on_one_compute_take_turns_others_do_not():
    arrivals = [Arrival(0.0, 10, 50) for _ in range(16)]
    apart = run(arrivals, split_of(2)).duration_s
    together = [make_device(0, compute="node"), make_device(1, compute="node")]
    shared = run(arrivals, split_of(2, devices=tuple(together))).duration_s
    whole = run(arrivals, split_of(1)).duration_s
    assert shared == pytest.approx(whole, rel=0.05)
    assert apart < 0.9 * whole


def test_waiting_is_that_of_the_queue_that_it_is():
    # One place, equal requests, Poisson arrivals: M/D/1, whose wait Pollaczek and Khinchine tell.
    split = split_of(1)
    service_s = step_s(prompt_shape(64), split)
    arrivals = gamma_arrivals(3000, rate=0.6 / service_s, cv=1, num_prompt_tokens=64, num_output_tokens=1, seed=[4])
    result = run(arrivals, split, limits=SchedulerLimits(max_num_seqs=1))
    wait_s = np.mean([request.latency_s for request in result.requests]) - service_s
    assert wait_s == pytest.approx(0.6 * service_s / (2 * (1 - 0.6)), rel=0.12)


def test_equal_runs_have_equal_results():
    arrivals = gamma_arrivals(100, rate=8, cv=3, num_prompt_tokens=50, num_output_tokens=20, seed=[1])

    def once():
        return run(arrivals, split_of(1), policy=Script((5.0, split_of(2)), (20.0, split_of(1))))

    assert msgspec.json.encode(once()) == msgspec.json.encode(once())


def test_a_change_takes_its_time_and_then_steps_are_shorter():
    # Idle: 4 s for a process, then the second half of 12 layers (and the head) at 200 MiB/s, then the next request.
    arrivals = [Arrival(0.0, 10, 2), Arrival(30.0, 10, 2)]
    first, second = run(arrivals, split_of(1), policy=Script((10.0, split_of(2)))).requests
    result = run(arrivals, split_of(1), policy=Script((10.0, split_of(2))))
    (change,) = result.changes
    assert change.asked_at == 10.0
    assert change.switched_at == pytest.approx(10.0 + 4.0 + (6 * 4 + 12) / 200)
    assert second.ttft_s == pytest.approx(step_s(prompt_shape(10), split_of(2)))
    assert first.ttft_s == pytest.approx(step_s(prompt_shape(10), split_of(1)))
    # Two devices are held from the moment on at which the second one is prepared.
    assert result.device_seconds == pytest.approx(10.0 + 2 * (result.duration_s - 10.0))
    assert {s.num_stages for s in result.samples if s.demand.at < 14} == {1}
    assert {s.num_stages for s in result.samples if s.demand.at > 15} == {2}


def test_under_load_loading_yields_and_steps_are_slower():
    arrivals = gamma_arrivals(300, rate=10, cv=1, num_prompt_tokens=50, num_output_tokens=20, seed=[2])
    times = RefactoringTimes(start_s=0.0, gentle=LoadPace(share=0.04, slowdown=0.5))
    busy = run(arrivals, split_of(1), policy=Script((5.0, split_of(2))), times=times)
    (change,) = busy.changes
    assert change.switched_at is not None
    assert change.switched_at - change.asked_at > 5 * (6 * 4 + 12) / 200
    calm = run(arrivals, split_of(1), times=times)
    window = [r for r in calm.requests if change.asked_at < r.arrived_at < change.switched_at]
    same = [r for r in busy.requests if change.asked_at < r.arrived_at < change.switched_at]
    assert np.mean([r.latency_s for r in same]) > 1.1 * np.mean([r.latency_s for r in window])


def test_kv_that_leaves_its_domain_is_copied_at_its_rate():
    # 1 KiB a token and layer: 1,000 tokens of 6 layers at 1 MiB/s.
    times = RefactoringTimes(start_s=0.0, gentle=LoadPace(share=1.0, slowdown=0.0), migration_bytes_per_s=MIB)
    arrivals = [Arrival(0.0, 1000, 3000)]
    (change,) = run(arrivals, split_of(1), policy=Script((5.0, split_of(2))), times=times).changes
    assert change.switched_at - change.asked_at == pytest.approx(0.18 + 6 * 1300 / 1024, rel=0.2)


def test_a_change_that_does_not_fit_is_refused_and_nothing_happens():
    # In one domain both hold their old layers and load the new ones: 110 MiB in all.
    small = tuple(make_device(i, domain="node", memory_bytes=100 * MIB) for i in range(2))
    arrivals = [Arrival(0.0, 500, 300)]
    moved = Split(boundaries=(11,), devices=small)
    result = run(arrivals, Split(boundaries=(1,), devices=small), policy=Script((1.0, moved)))
    (change,) = result.changes
    assert change.switched_at is None
    assert "KV blocks" in change.refused
    assert result.requests == run(arrivals, Split(boundaries=(1,), devices=small)).requests


def test_kv_shrinks_for_a_change_and_grows_after_it():
    small = tuple(make_device(i, memory_bytes=78 * MIB) for i in range(2))
    arrivals = gamma_arrivals(200, rate=12, cv=2, num_prompt_tokens=100, num_output_tokens=40, seed=[7])
    moved = Split(boundaries=(8,), devices=small)
    result = run(arrivals, Split(boundaries=(4,), devices=small), policy=Script((3.0, moved)))
    assert result.changes[0].switched_at is not None
    assert len(result.requests) == 200
    assert all(r.num_output_tokens == 40 for r in result.requests)


def test_pipelines_come_and_go_and_hand_over_what_they_have():
    arrivals = gamma_arrivals(200, rate=8, cv=2, num_prompt_tokens=60, num_output_tokens=60, seed=[3])
    script = Script((2.0, split_of(1, num_pipelines=2)), (9.0, split_of(1)), (14.0, split_of(2, num_pipelines=2)))
    result = run(arrivals, split_of(1), policy=script)
    assert [change.switched_at is not None for change in result.changes] == [True] * 3
    assert len(result.requests) == 200
    assert all(r.num_output_tokens == 60 and r.num_prompt_tokens == 60 for r in result.requests)
    assert {(s.num_stages, s.num_pipelines) for s in result.samples} == {(1, 1), (1, 2), (2, 2)}


def test_two_pipelines_serve_twice_as_many():
    arrivals = gamma_arrivals(200, rate=1000, cv=1, num_prompt_tokens=20, num_output_tokens=30, seed=[3])
    one = run(arrivals, split_of(1), limits=SchedulerLimits(max_num_seqs=8)).duration_s
    two = run(arrivals, split_of(1, num_pipelines=2), limits=SchedulerLimits(max_num_seqs=8))
    assert two.duration_s == pytest.approx(one / 2, rel=0.05)
    assert two.device_seconds == pytest.approx(2 * two.duration_s)


def test_unnamed_pipelines_have_devices_of_their_own():
    arrivals = gamma_arrivals(100, rate=1000, cv=1, num_prompt_tokens=20, num_output_tokens=30, seed=[3])
    split = split_of(1)
    unnamed = msgspec.structs.replace(split, num_pipelines=2)
    assert run(arrivals, unnamed).requests == run(arrivals, split_of(1, num_pipelines=2)).requests


def test_the_policy_is_asked_every_interval_with_what_the_server_knows():
    script = Script()
    arrivals = gamma_arrivals(100, rate=10, cv=1, num_prompt_tokens=40, num_output_tokens=10, seed=[5])
    result = run(arrivals, split_of(2), policy=script, interval_s=0.5)
    assert result.num_decisions == len(script.states) == len(result.samples)
    assert [s.now for s in script.states[:3]] == [0.5, 1.0, 1.5]
    last = script.states[-1]
    assert last.demand.num_arrived == sum(a.at_s <= last.now for a in arrivals) > 90
    assert last.demand.prompt_tokens == 40
    assert last.demand.output_tokens == pytest.approx(10, rel=0.1)
    assert last.trigger is Trigger.INTERVAL
    assert max(s.num_kv_tokens_in_use for s in script.states) > 0


def test_what_never_fits_is_rejected_and_a_split_without_room_refused():
    tiny = (make_device(0, memory_bytes=72 * MIB),)
    split = Split(boundaries=(), devices=tiny)
    result = run([Arrival(0.0, 10_000, 5), Arrival(0.0, 10, 5)], split)
    assert (len(result.requests), result.num_rejected) == (1, 1)
    with pytest.raises(ConfigError, match="more memory"):
        run([], Split(boundaries=(), devices=(make_device(0, memory_bytes=70 * MIB),)))


def test_a_summary():
    arrivals = gamma_arrivals(50, rate=10, cv=1, num_prompt_tokens=40, num_output_tokens=10, seed=[5])
    result = run(arrivals, split_of(1))
    summary = summarize(result)
    assert summary.num_requests == 50
    assert summary.latency.mean == pytest.approx(np.mean([r.latency_s for r in result.requests]))
    assert summary.tokens_per_s == pytest.approx(500 / result.duration_s)
    assert summarize(run([], split_of(1))) is None


@settings(max_examples=25, deadline=None)
@given(
    requests=st.lists(st.tuples(st.floats(0, 2), st.integers(1, 900), st.integers(1, 40)), min_size=1, max_size=25),
    moves=st.lists(
        st.tuples(st.floats(0, 20), st.integers(1, 2), st.integers(1, 2)),
        max_size=4,
    ),
    memory_mib=st.sampled_from([74, 90, 1000]),
)
def test_every_request_gets_all_its_tokens_whatever_changes(requests, moves, memory_mib):
    devices = tuple(make_device(i, memory_bytes=memory_mib * MIB) for i in range(4))
    at = 0.0
    arrivals = []
    for gap, num_prompt, num_output in requests:
        at += gap
        arrivals.append(Arrival(at, num_prompt, num_output))
    script = Script(*((t, split_of(s, num_pipelines=p, devices=devices)) for t, s, p in sorted(moves)))
    result = run(arrivals, split_of(1, devices=devices), policy=script)
    assert len(result.requests) + result.num_rejected == len(arrivals)
    if memory_mib == 1000:
        got = [(r.arrived_at, r.num_prompt_tokens, r.num_output_tokens) for r in result.requests]
        assert sorted(got) == sorted((a.at_s, a.num_prompt_tokens, a.num_output_tokens) for a in arrivals)
    assert all(math.isfinite(r.latency_s) and r.arrived_at < r.first_token_at <= r.finished_at for r in result.requests)
