"""The adaptation benchmark's arithmetic: workloads, figures, verdicts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from status_samples import pipeline_status, server_status, stage

from flexpipe_serve.bench.adapt import in_turn
from flexpipe_serve.bench.adapt_metrics import (
    Alone,
    Judged,
    Look,
    Paired,
    Verdict,
    assess,
    baseline_of,
    find_stalls,
    held_seconds,
    judge,
    sustained_rate,
)
from flexpipe_serve.bench.adapt_run import Variant
from flexpipe_serve.bench.adapt_server import write_json
from flexpipe_serve.bench.adapt_trace import TraceSpec, WorkloadFacts, make_workload
from flexpipe_serve.bench.arrivals import Arrival
from flexpipe_serve.bench.summary import Spread
from flexpipe_serve.bench.wave import RequestRecord
from flexpipe_serve.errors import ConfigError


def record(start_s: float, end_s: float, *, error: str | None = None) -> RequestRecord:
    times = () if error else (start_s + (end_s - start_s) / 2, end_s)
    return RequestRecord(
        start_s, start_s, end_s, 10, num_output_tokens=len(times), token_times_s=times, pieces=("a",) * len(times),
        error=error,
    )  # fmt: skip


def judged(start_s: float, end_s: float, *, alone_s: float = 1.0, error: str | None = None) -> Judged:
    return Judged(record(start_s, end_s, error=error), alone_s=alone_s, target_s=5 * alone_s)


# ---------------------------------------------------------------------- traces


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("gamma:4", TraceSpec("gamma, CV 4", cv=4.0)),
        ("a/b.csv.gz", TraceSpec("b", path=Path("a/b.csv.gz"))),
        ("b.csv@60", TraceSpec("b@60", path=Path("b.csv"), start_s=60.0)),
        ("b.csv@60+900", TraceSpec("b@60+900", path=Path("b.csv"), start_s=60.0, window_s=900.0)),
        ("odd@name.csv", TraceSpec("odd@name", path=Path("odd@name.csv"))),
    ],
)
def test_traces_by_name(text: str, expected: TraceSpec) -> None:
    assert TraceSpec.parse(text) == expected


@pytest.mark.parametrize("text", ["gamma:", "gamma:-1", "gamma:nan", "gamma:1e9", "b.csv@1+0", ""])
def test_no_traces(text: str) -> None:
    with pytest.raises(ConfigError):
        TraceSpec.parse(text)


@given(
    cv=st.sampled_from([0.0, 0.5, 1.0, 4.0, 8.0]), num=st.integers(2, 200), duration_s=st.floats(1, 1000),
    seed=st.integers(0, 1000),
)  # fmt: skip
@settings(max_examples=50, deadline=None)
def test_gamma_workloads_have_the_rate_and_the_order_asked_for(
    cv: float, num: int, duration_s: float, seed: int
) -> None:
    spec = TraceSpec.parse(f"gamma:{cv}")
    workload = make_workload(spec, num, duration_s=duration_s, mean_prompt=20, mean_output=10, seed=seed)
    again = make_workload(spec, num, duration_s=duration_s, mean_prompt=20, mean_output=10, seed=seed)
    times = [arrival.at_s for arrival in workload]
    assert workload == again
    assert len(workload) == num
    assert times == sorted(times)
    assert 0 <= times[0] <= times[-1] <= duration_s * (1 + 1e-9)
    assert {(a.num_prompt_tokens, a.num_output_tokens) for a in workload} == {(20, 10)}
    if cv == 0:
        assert np.diff(times) == pytest.approx(duration_s / (num + 1), rel=1e-6)


@pytest.mark.parametrize("cv", [1, 4])
def test_gamma_workloads_have_the_cv_asked_for(cv: float) -> None:
    spec = TraceSpec.parse(f"gamma:{cv}")
    workload = make_workload(spec, 20_000, duration_s=100, mean_prompt=1, mean_output=1, seed=3)
    assert WorkloadFacts.of(workload, duration_s=100).cv == pytest.approx(cv, rel=0.1)


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """2 requests a second for 100 s, then 8 a second for 100 s; prompts of 100 to 900 tokens."""
    rng = np.random.default_rng(1)
    times = [*np.arange(0, 100, 0.5), *np.arange(100, 200, 0.125)]
    lines = ["arrival_s,prompt_tokens,output_tokens"]
    lines += [f"{at_s},{rng.integers(100, 900)},{rng.integers(1, 40)}" for at_s in times]
    path = tmp_path / "trace.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_requests_in_a_row_keep_their_gaps_in_another_unit(trace: Path) -> None:
    spec = TraceSpec.parse(f"{trace}@50")
    workload = make_workload(spec, 200, duration_s=30, mean_prompt=64, mean_output=16, seed=0)
    times = np.array([arrival.at_s for arrival in workload])
    # 100 requests are left of the slow part; the fast one's gaps are a quarter of its.
    gaps = np.diff(times)
    assert gaps[:99] == pytest.approx(4 * gaps[-1])
    assert gaps[100:] == pytest.approx(gaps[-1])
    assert times[0] == 0
    assert times[-1] + gaps[-1] == pytest.approx(30)
    facts = WorkloadFacts.of(workload, duration_s=30)
    assert facts.mean_prompt == pytest.approx(64, rel=0.02)
    assert facts.mean_output == pytest.approx(16, rel=0.05)


def test_a_window_keeps_its_changes_of_rate(trace: Path) -> None:
    spec = TraceSpec.parse(f"{trace}@0+200")
    workload = make_workload(spec, 100, duration_s=20, mean_prompt=64, mean_output=16, seed=0)
    times = np.array([arrival.at_s for arrival in workload])
    assert len(workload) == 100
    assert times[-1] <= 20
    assert (times < 10).sum() == pytest.approx(20, abs=10)  # a fifth of the requests came in the first half
    assert WorkloadFacts.of(workload, duration_s=20).peak > 1.3


@pytest.mark.parametrize(
    ("where", "remedy"), [("@190", "begin earlier"), ("@0+10", "longer window"), ("@900", "begin")]
)
def test_a_trace_that_is_too_short(trace: Path, where: str, remedy: str) -> None:
    with pytest.raises(ConfigError, match=remedy):
        make_workload(TraceSpec.parse(f"{trace}{where}"), 100, duration_s=10, mean_prompt=8, mean_output=8, seed=0)


@given(
    st.lists(st.tuples(st.integers(1, 10_000), st.integers(1, 10_000)), min_size=5, max_size=50), st.integers(4, 200)
)
@settings(max_examples=50, deadline=None)
def test_lengths_are_scaled_to_the_mean_and_cut(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[tuple[int, int]], mean: int
) -> None:
    path = tmp_path_factory.mktemp("trace") / "t.csv"
    rows = [f"{index},{prompt},{output}" for index, (prompt, output) in enumerate(lengths)]
    path.write_text("\n".join(["arrival_s,prompt_tokens,output_tokens", *rows]) + "\n")
    workload = make_workload(
        TraceSpec("t", path=path), len(lengths) - 1, duration_s=10, mean_prompt=mean, mean_output=mean, seed=0
    )
    prompts = [arrival.num_prompt_tokens for arrival in workload]
    assert 1 <= min(prompts) <= max(prompts) <= 4 * mean
    given_prompts = [prompt for prompt, _ in lengths[:-1]]
    assert [prompts[i] for i in np.argsort(given_prompts, kind="stable")] == sorted(prompts)
    # Rounding moves each length by half a token at most, all of them at once where they are equal.
    assert np.mean(prompts) == pytest.approx(mean, abs=0.51 + 0.01 * mean) or max(prompts) == 4 * mean


# ---------------------------------------------------------------------- figures


@given(st.floats(1e-4, 0.1), st.floats(1e-4, 0.1))
def test_the_latency_alone_is_found_again(prompt_s: float, output_s: float) -> None:
    requests = [Arrival(0, 10, 5), Arrival(0, 100, 7), Arrival(0, 30, 60)]
    truth = Alone(prompt_s, output_s)
    found = Alone.fit([(request, truth.seconds(request)) for request in requests])
    assert found.prompt_token_s == pytest.approx(prompt_s, rel=1e-6)
    assert found.output_token_s == pytest.approx(output_s, rel=1e-6)


def test_the_latency_alone_with_equal_lengths_and_with_odd_ones() -> None:
    same = Arrival(0, 64, 32)
    assert Alone.fit([(same, 1.0), (same, 3.0)]).seconds(same) == pytest.approx(2)
    odd = Alone.fit([(Arrival(0, 10, 10), 1.0), (Arrival(0, 100, 11), 0.9)])  # the longer prompt was faster
    assert odd.prompt_token_s == 0
    assert odd.output_token_s > 0


def test_a_closed_loop_is_measured_while_it_is_full() -> None:
    # Two places, 1 s a request; the last one is left alone and takes as long.
    requests = [record(s, s + 1) for s in (0, 0, 1, 1, 2)]
    assert sustained_rate(requests) == 2
    assert sustained_rate([record(0, 4), record(0, 2)]) == 0.5


def test_stalls() -> None:
    latencies = [1, 1.4, 1.6, 3, 1.3, 1.2, 1, 2, 9]
    stalls = find_stalls([(float(at), latency) for at, latency in enumerate(latencies)], baseline=1.0)
    assert [(stall.start_s, stall.end_s, stall.is_over) for stall in stalls] == [(2, 5, True), (7, 8, False)]
    assert [stall.seconds for stall in stalls] == [3, 1]
    assert find_stalls([], baseline=1.0) == []


@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0.01, 10)), max_size=40), st.floats(0.1, 5))
def test_stalls_lie_apart_and_in_order(responses: list[tuple[float, float]], baseline: float) -> None:
    stalls = find_stalls(responses, baseline=baseline)
    edges = [edge for stall in stalls for edge in (stall.start_s, stall.end_s)]
    assert edges == sorted(edges)
    assert all(stall.is_over for stall in stalls[:-1])
    assert bool(stalls) == any(latency > 1.5 * baseline for _, latency in responses)


def test_what_is_held_is_summed_over_time() -> None:
    assert held_seconds([0, 2, 5], [1, 3, 2], start_s=1, end_s=7) == 1 * 1 + 3 * 3 + 2 * 2
    assert held_seconds([2, 3], [1, 2], start_s=0, end_s=4) == 3 + 2  # the first one was there before it was seen
    assert held_seconds([0, 2, 9], [1, 3, 9], start_s=1, end_s=4) == 1 + 6
    assert held_seconds([], [], start_s=0, end_s=4) == 0


@given(st.lists(st.floats(0, 50), min_size=1, max_size=20).map(sorted), st.floats(0, 20), st.floats(0.1, 40))
def test_one_thing_held_all_the_time(times: list[float], start_s: float, length_s: float) -> None:
    end_s = start_s + length_s
    assert held_seconds(times, [1] * len(times), start_s=start_s, end_s=end_s) == pytest.approx(length_s)


def look(at_s: float, num_stages: int, num_devices: int) -> Look:
    return Look(at_s, num_stages, num_devices, 1, (), 0, 0, 9)


def test_figures_of_a_run() -> None:
    requests = [judged(10, 11), judged(11, 12), judged(12, 18), judged(18, 19), judged(19, 20, error="lost")]
    looks = [look(0, 1, 1), look(15, 2, 2)]
    figures = assess(requests, looks, [5.0, 15.0], baseline=1.0, start_s=10, load_s=10)
    assert figures.num_requests == 5
    assert figures.num_lost == 1
    assert figures.latency_ms.mean == pytest.approx(2250)
    assert figures.ttft_ms.p50 == pytest.approx(500)
    assert figures.goodput_per_s == 0.3
    assert figures.good_share == 0.6
    assert (figures.num_stalls, figures.recovery_s) == (1, 1.0)
    assert figures.stalled_share == 0.1
    assert figures.stage_s == figures.device_s == 5 * 1 + 5 * 2
    assert figures.num_switches == 1  # the other one came before anything counted
    assert baseline_of(requests) == 1.0


def test_figures_of_a_run_without_an_answer() -> None:
    figures = assess([judged(0, 1, error="x")], [], [], baseline=None, start_s=0, load_s=1)
    assert figures.num_lost == 1
    assert figures.latency_ms.mean is None
    assert figures.recovery_s is None
    assert baseline_of([judged(0, 1, error="x")]) is None


def spread(*values: float) -> Spread:
    found = Spread.of(values)
    assert found is not None
    return found


def test_verdicts() -> None:
    def verdict_of(policy: Spread, statics: dict[str, Spread], *, same_as: str | None = None) -> Verdict:
        return judge("gated", policy, statics, paired=dict.fromkeys(statics), same_as=same_as)

    statics = {"static 1": spread(100, 110, 101), "static 2": spread(150, 160)}
    verdict = verdict_of(spread(105, 112), statics)
    assert verdict.best == "static 1"
    assert verdict.ratio == pytest.approx(108.5 / 101)
    assert verdict.limit == pytest.approx(110 / 101)  # its own range is wider than 2 %
    assert verdict.is_met
    assert verdict.by_static["static 2"] == pytest.approx(108.5 / 155)
    assert not verdict_of(spread(103), {"static 1": spread(100)}).is_met
    assert verdict_of(spread(101.9), {"static 1": spread(100)}).is_met
    # In the best static layout all the time: what it took more was chance. In another one it was not.
    assert verdict_of(spread(103), {"static 1": spread(100)}, same_as="static 1").is_met
    assert not verdict_of(spread(200), statics, same_as="static 2").is_met


def test_a_paired_difference_by_hand() -> None:
    found = Paired.of([[(1.0, 2.0), (3.0, 2.0)], [(1.5, 1.0)], [], [(1.0, 1.0)]])
    assert found is not None
    assert found.high is not None
    assert found.mean == pytest.approx(0.5 / 3)
    # Student's t, 2 degrees of freedom, of 0, 0.5, 0.
    assert found.high == pytest.approx(0.5 / 3 + 4.303 * math.sqrt(1 / 12) / math.sqrt(3))
    assert found.low == pytest.approx(2 * found.mean - found.high)
    assert Paired.of([[(1.0, 2.0)]]) == Paired(-0.5, None, None, 1)
    assert Paired.of([[]]) is None


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.integers(2, 14), st.floats(-0.3, 0.3))
def test_what_all_runs_of_a_repetition_share_widens_no_paired_interval(seed: int, num: int, truth: float) -> None:
    """A machine that is slower in one repetition is so for both variants."""
    rng = np.random.default_rng(seed)
    repeats = []
    for factor in rng.uniform(1, 3, num):
        others = factor * rng.uniform(0.5, 2.0, 20)
        repeats.append([((1 + truth) * other, other) for other in others])
    found = Paired.of(repeats)
    assert found is not None
    assert found.low is not None
    assert found.high is not None
    assert found.low == pytest.approx(truth)
    assert found.high == pytest.approx(truth)


def test_looks_count_the_stages_of_all_pipelines() -> None:
    from flexpipe_serve.bench.adapt_run import look_at

    stages = [stage(compute="n/cpu"), stage(compute="n/cores 1")]
    some: dict[str, Any] = {"queue": {"num_running": 2, "num_waiting": 1}, "kv": {"num_blocks": 7}}
    pipeline = pipeline_status([3], stages=stages, **some)
    assert look_at(server_status(pipeline), at_s=1.5) == Look(1.5, 2, 2, 1, (3,), 2, 1, 7)
    both = server_status(pipeline, pipeline_status(stages=stages[:1], **some))
    assert look_at(both, at_s=0) == Look(0, 3, 2, 2, (3,), 4, 2, 7)


def test_variants_take_turns_to_and_fro() -> None:
    variants = [Variant("static 1", ()), Variant("static 2", (15,)), Variant("gated", (), "gated")]
    orders = [
        [[variant.name for variant in in_turn(variants, index=index, repeat=repeat)] for index in range(3)]
        for repeat in range(2)
    ]
    there = ["static 1", "gated", "static 2"]
    assert orders[0] == [there, there[::-1], there]
    # Over two repetitions each has the same mean place in each trace.
    assert orders[1] == [order[::-1] for order in orders[0]]


def test_results_are_replaced_as_a_whole(tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    write_json({"runs": [1]}, file)
    with pytest.raises(TypeError):
        write_json({"runs": [object()]}, file)
    assert file.read_text() == '{"runs": [1]}\n'
    assert list(tmp_path.iterdir()) == [file]
