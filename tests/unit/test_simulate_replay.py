"""``flexpipe plan``: the present decision, and a policy over a trace."""

import argparse
import json
import math

import pytest
from made_up_models import MIB, make_device, make_profile

from flexpipe_serve import cli_plan
from flexpipe_serve.bench.arrivals import gamma_arrivals
from flexpipe_serve.errors import ConfigError
from flexpipe_serve.model.profile_cache import write_profile
from flexpipe_serve.planner.profile import Curve
from flexpipe_serve.planner.types import (
    Calibration,
    CandidateScore,
    Decision,
    Demand,
    PlannerWeights,
    Prediction,
    Split,
    Trigger,
    Verdict,
)
from flexpipe_serve.planner.wire import from_wire
from flexpipe_serve.simulate.replay import replay

PROFILE = make_profile()
WEIGHTS = PlannerWeights(max_stages=4)


def load(rate, *, num_requests=400):
    return gamma_arrivals(num_requests, rate=rate, cv=1.0, num_prompt_tokens=60, num_output_tokens=20, seed=[2])


def replayed(arrivals, **options):
    arguments = {"policy": "static", "weights": WEIGHTS, "num_nodes": 4, "memory_bytes": 4096 * MIB, **options}
    return replay(PROFILE, arrivals, **arguments)


def test_a_load_beyond_one_stage_makes_the_gated_policy_move_and_that_pays():
    arrivals = load(16.0, num_requests=800)
    static = replayed(arrivals)
    gated = replayed(arrivals, policy="gated")
    assert 0 < gated.num_decisions < len(gated.samples)  # none while a change is on
    assert any(change.switched_at is not None and change.new.num_stages > 1 for change in gated.changes)
    assert gated.decisions[0].chosen == gated.changes[0].new

    def latency(result):
        return sum(request.latency_s for request in result.requests) / len(result.requests)

    assert latency(gated) < 0.7 * latency(static)
    assert static.changes == ()


def test_no_load_to_speak_of_moves_nothing():
    result = replayed(load(0.5, num_requests=60), policy="gated")
    assert {sample.num_stages for sample in result.samples if sample.demand.num_arrived < 10} == {1}
    assert len(result.changes) <= 1


@pytest.mark.parametrize("num_stages", [0, 5])
def test_there_are_as_many_nodes_as_stages(num_stages):
    with pytest.raises(ConfigError, match=f"{num_stages} stages on 4 nodes"):
        replayed(load(1.0), num_stages=num_stages)


def test_a_model_that_does_not_fit_is_refused_with_its_numbers():
    with pytest.raises(ConfigError, match="12 layers and 70 MiB"):
        replayed(load(1.0), memory_bytes=430 * MIB)


def run_cli(*arguments):
    parser = argparse.ArgumentParser()
    cli_plan.add_command(parser.add_subparsers(required=True))
    args = parser.parse_args(["plan", *map(str, arguments)])
    return args.run(args)


@pytest.fixture
def trace(tmp_path):
    path = tmp_path / "trace.csv"
    rows = [f"{a.at_s},{a.num_prompt_tokens},{a.num_output_tokens}" for a in load(12.0, num_requests=300)]
    path.write_text("\n".join(["arrival_s,prompt_tokens,output_tokens", *rows]) + "\n")
    return path


@pytest.fixture
def profile(tmp_path):
    path = tmp_path / "profile.json"
    write_profile(PROFILE, path)
    return path


def test_a_replay_from_the_command_line(trace, profile, tmp_path, capsys):
    plot, content = tmp_path / "replay.png", tmp_path / "replay.json"
    assert run_cli("--replay", trace, "--profile", profile, "--plot", plot, "--json", content) == 0
    printed = capsys.readouterr().out
    assert "simulated" in printed
    assert "nothing here was measured on a server" in printed
    assert "300 requests served" in printed
    assert plot.read_bytes().startswith(b"\x89PNG")
    written = json.loads(content.read_bytes())
    assert written["simulated"] is True
    assert written["summary"]["num_requests"] == 300
    assert len(written["decisions"]) == len(written["result"]["changes"])
    for decision in written["decisions"]:
        assert from_wire(decision).verdict is Verdict.MOVE


def test_scales_of_a_replay(trace, profile, tmp_path):
    def durations(*scales):
        content = tmp_path / "replay.json"
        assert run_cli("--replay", trace, "--profile", profile, "--policy", "static", "--json", content, *scales) == 0
        return json.loads(content.read_bytes())

    plain, fast = durations("--max-requests", 20), durations("--max-requests", 20, "--rate-scale", 10)
    short = durations("--max-requests", 20, "--length-scale", 0.1)
    assert fast["result"]["requests"][-1]["arrived_at"] == pytest.approx(
        plain["result"]["requests"][-1]["arrived_at"] / 10
    )
    assert short["result"]["requests"][0]["num_output_tokens"] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--replay", "missing.csv"], "--replay needs --profile"),
        (["--plot", "a.png"], "go with --replay"),
        (["--replay", "TRACE", "--profile", "PROFILE", "--rate-scale", "0"], "--rate-scale is 0.0"),
        (["--replay", "TRACE", "--profile", "PROFILE", "--memory", "much"], "--memory is 'much'"),
        (["--replay", "TRACE", "--profile", "TRACE"], "is no profile"),
        (["--replay", "PROFILE", "--profile", "PROFILE"], "a trace needs the columns"),
    ],
)
def test_wrong_arguments_are_told(arguments, message, trace, profile, capsys):
    files = {"TRACE": trace, "PROFILE": profile}
    assert run_cli(*(files.get(argument, argument) for argument in arguments)) == 1
    assert message in capsys.readouterr().err


def a_decision():
    devices = (make_device(0), make_device(1))
    now, other = Split(boundaries=(), devices=devices[:1]), Split(boundaries=(6,), devices=devices)
    saturated = Prediction(
        ttft_s=math.inf, tpot_s=math.inf, latency_s=math.inf, max_rate=2.0, utilisation=1.5, num_kv_tokens=1000
    )
    fine = Prediction(ttft_s=0.2, tpot_s=0.03, latency_s=1.4, max_rate=4.0, utilisation=0.75, num_kv_tokens=3000)
    best = CandidateScore(split=other, prediction=fine, score=8.0, gain_s=9.5, cost_s=1.5)
    refused = CandidateScore(
        split=Split(boundaries=(3, 6), devices=(*devices, devices[0])), prediction=fine, score=0.0, refused="memory"
    )
    return Decision(
        at=12.0,
        policy="gated",
        trigger=Trigger.ASKED,
        demand=Demand(
            at=12.0, rate=3.0, rate_gradient=0.1, cv=2.0, cv_by_window={}, prompt_tokens=50.0, output_tokens=20.0
        ),
        current=CandidateScore(split=now, prediction=saturated, score=0.0),
        candidates=(best, refused),
        verdict=Verdict.MOVE,
        chosen=other,
        sentence="Move: it pays.",
        decision_s=0.0005,
        calibration=Calibration(compute=Curve(counts=(1.0, 512.0), seconds=(1.5, 1.2)), num_steps=77),
    )


class FakeHandle:
    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def plan(self):
        return a_decision()


def test_the_present_decision(monkeypatch, tmp_path, capsys):
    asked = []
    monkeypatch.setattr(cli_plan, "connect", lambda url, *, api_key: asked.append((url, api_key)) or FakeHandle())
    content = tmp_path / "plan.json"
    assert run_cli("--url", "http://server:1", "--api-key", "k", "--json", content) == 0
    assert asked == [("http://server:1", "k")]
    printed = capsys.readouterr().out
    for part in ("move: Move: it pays.", "3.00 requests/s (+0.100/s each second)", "2 stages [6]", "∞", "1.40 s"):
        assert part in printed
    assert "memory" in printed
    assert "times 1.20 to 1.50 by the size of a step, as 77 live steps say" in printed.replace("\n", " ")
    assert from_wire(json.loads(content.read_bytes())) == a_decision()
