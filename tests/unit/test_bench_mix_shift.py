"""The mix-shift experiment's requests and scores, and the reports of both adaptation benchmarks."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from status_samples import pipeline_status, server_status

from flexpipe_serve.bench import adapt_report, mix_shift, mix_shift_report
from flexpipe_serve.bench.adapt_metrics import Alone, Look
from flexpipe_serve.bench.adapt_plot import save_plot
from flexpipe_serve.bench.adapt_report import TraceResult, Yardstick
from flexpipe_serve.bench.adapt_run import AdaptRun, Variant
from flexpipe_serve.bench.adapt_server import compare_answers
from flexpipe_serve.bench.adapt_trace import WorkloadFacts
from flexpipe_serve.bench.arrivals import Arrival
from flexpipe_serve.bench.identity import Difference
from flexpipe_serve.bench.mix_shift_plan import (
    Mix,
    SweepPoint,
    Totals,
    best_boundary,
    scores_of,
    shifting_arrivals,
)
from flexpipe_serve.bench.resize_plan import Profile
from flexpipe_serve.bench.resize_run import Calibration
from flexpipe_serve.bench.wave import RequestRecord, Wave
from flexpipe_serve.engine.status import ServerStatus

PREFILL, DECODE = Mix("100+4", 100, 4), Mix("10+40", 10, 40)


def test_requests_shift_from_one_kind_to_the_other() -> None:
    arrivals = shifting_arrivals([(PREFILL, 2.0, 30.0), (DECODE, 0.5, 20.0)], cv=0.1, seed=4)
    assert [a.num_prompt_tokens for a in arrivals] == [100] * 60 + [10] * 10
    times = np.array([a.at_s for a in arrivals])
    assert (np.diff(times) > 0).all()
    assert times[59] < 30 <= times[60]
    assert times[-1] < 50
    gaps = np.diff(times[:60])
    assert gaps.std() / gaps.mean() == pytest.approx(0.1, rel=0.4)
    assert arrivals == shifting_arrivals([(PREFILL, 2.0, 30.0), (DECODE, 0.5, 20.0)], cv=0.1, seed=4)


def test_the_composite_is_the_mean_of_scores_in_units_of_the_best() -> None:
    scores = scores_of({"a": Totals(1.0, 0.2, 100.0), "b": Totals(4.0, 0.1, 80.0)})
    assert (scores["a"].ttft, scores["a"].tpot, scores["a"].throughput) == (1, 0.5, 1)
    assert (scores["b"].ttft, scores["b"].tpot, scores["b"].throughput) == (0.25, 1, 0.8)
    assert scores["a"].composite == pytest.approx(2.5 / 3)


def test_totals_of_requests() -> None:
    requests = [
        RequestRecord(1.0, 1.0, 4.0, 10, num_output_tokens=3, token_times_s=(2.0, 3.0, 4.0)),
        RequestRecord(2.0, 2.0, 5.0, 20, num_output_tokens=1, token_times_s=(5.0,)),
        RequestRecord(2.0, 2.0, 9.0, 20, error="lost"),
    ]
    assert Totals.of(requests) == Totals(ttft_s=2.0, tpot_s=1.0, tokens_per_s=34 / 4)
    assert Totals.of(requests[2:]) is None


def test_the_best_boundary_of_each_kind() -> None:
    points = [SweepPoint(b, 10 * b, {PREFILL.name: 20 - b, DECODE.name: float(b)}) for b in (12, 15, 18)]
    assert best_boundary(points, PREFILL) == 12
    assert best_boundary(points, DECODE) == 18
    text = rendered(mix_shift_report.sweep_table(points, [PREFILL, DECODE]))
    assert "180" in text


def run_of(name: str, *, repeat: int = 0, factor: float = 1.0, policy: str | None = None) -> AdaptRun:
    requests = tuple(
        RequestRecord(
            at_s, at_s, at_s + factor, prompt, num_output_tokens=2, token_times_s=(at_s + factor / 2, at_s + factor),
            pieces=("a", "b"), server_prompt_tokens=prompt,
        )
        for at_s, prompt in ((0.0, 100), (2.0, 100), (6.0, 10), (8.0, 10))
    )  # fmt: skip
    looks = (Look(0.0, 1, 1, 1, (), 1, 0, 9), Look(5.0, 2, 1, 1, (15,), 1, 0, 9))
    variant = Variant(name, (), policy)
    return AdaptRun(variant, repeat, Wave(name, 0.0, requests, 0.1), looks, (), ({"verdict": "stay"},), 1e9)


@pytest.fixture
def result() -> TraceResult:
    workload = [Arrival(at_s, prompt, 2) for at_s, prompt in ((0.0, 100), (2.0, 100), (6.0, 10), (8.0, 10))]
    result = TraceResult(
        name="shift [a]",
        workload=workload,
        facts=WorkloadFacts.of(workload, duration_s=10),
        yardstick=Yardstick({"balanced": 0.8, "static 1": 0.5}, Alone(0.001, 0.1)),
        lead_in_s=1.0,
        duration_s=9.0,
        slo_s=1.5,
        slo_factor=5.0,
    )
    for repeat in range(2):
        result.runs += [
            run_of("balanced", repeat=repeat),
            run_of("static 1", repeat=repeat, factor=2.0),
            run_of("gated", repeat=repeat, factor=0.5, policy="gated"),
        ]
    return result


def test_the_report_says_who_was_faster(result: TraceResult) -> None:
    figures = result.figures()
    assert {name: [each.latency_ms.mean for each in own] for name, own in figures.items()} == {
        "balanced": [1000, 1000], "static 1": [2000, 2000], "gated": [500, 500],
    }  # fmt: skip
    assert [each.num_requests for each in figures["balanced"]] == [3, 3]  # the first one came in the lead-in
    assert figures["static 1"][0].good_share == 0
    (verdict,) = result.verdicts()
    assert (verdict.policy, verdict.best, verdict.is_met) == ("gated", "balanced", True)
    assert verdict.ratio == 0.5
    text = rendered(adapt_report.render(result))
    assert "gated never moved: same layout as balanced throughout, the best static one" in text
    assert "mean 500 ms against 1000 ms" in text
    assert "request by request -50.0% [-50.0% to -50.0%]" in text
    assert "shift [a]" in text
    assert "-50.0% against balanced, -75.0% against static 1)" in text
    result.published = -0.383
    assert "FlexPipe's paper has -38.3% against static" in rendered(adapt_report.render(result))


def test_the_overview_has_a_line_for_each_policy_of_each_trace(result: TraceResult) -> None:
    lines = rendered(adapt_report.overview([result, replace(result, name="other")])).splitlines()
    (line,) = [line for line in lines if "other" in line]
    assert line.split() == [
        "other", "balanced", "1000", "gated", "500", "-50.0%", "+2.0%", "-50.0%", "[-50.0%", "to", "-50.0%]", "0",
        "balanced", "8",
    ]  # fmt: skip
    assert sum("gated" in line for line in lines) == 2


def test_differences_and_losses_are_shown(result: TraceResult) -> None:
    difference = Difference(2, 5, 1, 3, "right", "wrong", 0.5)
    result.differences.append((result.runs[2], difference))
    text = rendered(adapt_report.render(result))
    assert "gated, repeat 1: request 2 said 'wrong' instead of 'right' (the two best tokens 5.0e-01 apart)" in text
    data = json.loads(json.dumps(adapt_report.to_json(result)))
    assert data["differences"][0]["variant"] == "gated"


def test_the_mix_shift_report(result: TraceResult, tmp_path: Path) -> None:
    rounds = mix_shift_report.scored(result)
    assert len(rounds) == 2
    found = mix_shift_report.gain(rounds, "gated")
    assert found is not None
    scores = rounds[0][1]
    assert found.median == pytest.approx(scores["gated"].composite / scores["balanced"].composite - 1)
    assert found.median > 0
    text = rendered(mix_shift_report.render(result, shift_s=5.0))
    assert "gain over" in text
    assert "gated: composite +" in text
    assert "(PipeLive's paper: +36%)" in text
    points = [SweepPoint(15, 10, {PREFILL.name: 1.0, DECODE.name: 1.0})]
    data = json.loads(json.dumps(mix_shift_report.to_json(points, result, shift_s=5.0)))
    assert data["composite"][0]["gated"]["composite"] == pytest.approx(scores["gated"].composite)
    assert mix_shift_report.to_json(points, None, shift_s=5.0)["sweep"]
    save_plot(result, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


class FakeHandle:
    """Says how close the two best tokens were."""

    async def call(self, method: str, path: str, kind: type, body: dict[str, Any]) -> dict[str, Any]:
        assert (method, path, body["prompt"], body["max_tokens"]) == ("POST", "/v1/completions", "prompt 1", 2)
        top = [{"a": -0.1, "c": -3.0}, {"b": -0.5, "c": -0.5004}]
        return {"choices": [{"logprobs": {"text_offset": [0, 1], "top_logprobs": top}}]}


async def test_answers_are_compared_with_the_first_ones(result: TraceResult) -> None:
    session: Any = SimpleNamespace(handle=FakeHandle(), target=SimpleNamespace(model="m"))
    prompts = [f"prompt {index}" for index in range(4)]
    assert await compare_answers(result.runs, session, result.workload, prompts) == []
    run = result.runs[1]
    requests = list(run.wave.requests)
    requests[1] = replace(requests[1], pieces=("a", "c"))
    requests[2] = replace(requests[2], pieces=(), error="lost")
    changed = replace(run, wave=replace(run.wave, requests=tuple(requests)))
    ((where, difference),) = await compare_answers([result.runs[0], changed], session, result.workload, prompts)
    assert where is changed
    assert (difference.prompt, difference.char, difference.found) == (1, 1, "c")
    assert difference.logprob_gap == pytest.approx(4e-4)


async def test_budgets_follow_what_processes_take_with_little_kv(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With plentiful KV they take more: the budget from there left room for three times the blocks asked for."""
    profile = Profile(
        boundary=15, num_layers=30, weights_bytes=(100 << 20, 100 << 20), overhead_bytes=(200 << 20, 200 << 20),
        layer_bytes=2 << 20, block_bytes=24_576, block_size=16,
    )  # fmt: skip
    budgets: list[dict[str, int]] = []

    async def calibrate(*_: object, **__: object) -> Calibration:
        return Calibration(profile, 1.0, 1.0)

    @contextlib.asynccontextmanager
    async def running_session(*_: object, server_args: dict[str, Any], **__: object) -> AsyncIterator[Any]:
        budgets.append(server_args["memory_budget"])

        async def status() -> ServerStatus:
            return server_status(pipeline_status(kv={"num_blocks": 39}))

        async def capacity(*_: object, **__: object) -> float:
            return 1.0

        yield SimpleNamespace(handle=SimpleNamespace(status=status), capacity=capacity)

    monkeypatch.setattr(mix_shift, "calibrate", calibrate)
    monkeypatch.setattr(mix_shift, "running_session", running_session)
    monkeypatch.setattr(mix_shift, "PromptBuilder", lambda _: SimpleNamespace(build=lambda num, rng: "x" * num))
    parser = argparse.ArgumentParser()
    mix_shift.add_arguments(parser)
    config = tmp_path / "config.yaml"
    config.write_text("applications: [{args: {model: {source: demo}}}]")
    args = parser.parse_args(["--config", str(config), "--tokenizer", "x", "--server-log", str(tmp_path / "log")])
    experiment = mix_shift._Experiment(args, Console(file=io.StringIO()))
    _, fast = await experiment._budgets()
    # 12 blocks for 192 tokens were asked for, in 17 layers.
    assert fast == budgets[0]["stage-1"] - (39 - 12) * 17 * 24_576
    assert parser.parse_args(["--budgets", "400,320.5"]).budgets == (400 << 20, 641 << 19)
    for wrong in (["--rates", "1"], ["--rates", "1,x"], ["--rates", "0,1"]):
        with pytest.raises(SystemExit):
            parser.parse_args(wrong)


def rendered(what: object) -> str:
    console = Console(width=400, record=True, file=open("/dev/null", "w"))  # noqa: SIM115 - it is nothing
    console.print(what)
    return console.export_text()
