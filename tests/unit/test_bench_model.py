"""What the latency model is compared with, and how it is told."""

import dataclasses
import io
import json
import math
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from profile_cases import profile_of
from rich.console import Console
from status_samples import pipeline_status, server_status, stage
from test_bench_summary import record as request

from flexpipe_serve.bench.arrivals import Arrival, gamma_arrivals
from flexpipe_serve.bench.model_points import Point, demand_of, mean_error, predict_point, split_of
from flexpipe_serve.bench.model_report import render, to_json
from flexpipe_serve.bench.model_run import Load
from flexpipe_serve.bench.wave import Wave
from flexpipe_serve.cli import main
from flexpipe_serve.engine.status import ServerStatus
from flexpipe_serve.planner.latency import predict
from flexpipe_serve.planner.profile import Curve
from flexpipe_serve.planner.types import Calibration, SchedulerLimits

PROFILE = profile_of()
WAVE = Wave("flexpipe", 0.0, (request(0.0, 0.5, 0.6, 0.7), request(1.0, 1.1, 1.3, 1.5)), client_cpu_s=0.0)
ARRIVALS = [Arrival(0.5, 100, 50), Arrival(1.0, 100, 50)]


def status_of(*boundaries: int, overheads: tuple[int, ...], max_tokens: int = 4096) -> ServerStatus:
    stages = [stage(f"stage-{index}", overhead_bytes=overhead) for index, overhead in enumerate(overheads)]
    assert len(stages) == len(boundaries) + 1
    return server_status(pipeline_status(boundaries, stages=stages, kv={"max_tokens": max_tokens}))


def point_of(rate: float | None) -> Point:
    split = split_of(status_of(3, overheads=(1, 2)), PROFILE)
    return predict_point(PROFILE, split, ARRIVALS, rate=rate, wave=WAVE)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.tuples(st.integers(0, 10**9), st.integers(0, 10**9)), st.integers(200, 10**6))
def test_a_split_has_the_servers_kv(boundary: int, overheads: tuple[int, int], max_tokens: int) -> None:
    split = split_of(status_of(boundary, overheads=overheads, max_tokens=max_tokens), PROFILE)
    assert predict(PROFILE, split, demand_of(ARRIVALS, rate=None)).num_kv_tokens == max_tokens


def test_stages_of_one_node_take_turns() -> None:
    split = split_of(status_of(2, 4, overheads=(0, 0, 0)), PROFILE)
    assert split.boundaries == (2, 4)
    assert len({device.compute for device in split.devices}) == 1
    assert len({device.domain for device in split.devices}) == 3


def test_demand_is_what_came() -> None:
    arrivals = gamma_arrivals(4000, rate=5.0, cv=2.0, num_prompt_tokens=128, num_output_tokens=64, seed=(1,))
    demand = demand_of(arrivals, rate=7.0)
    assert demand.rate == pytest.approx(4000 / arrivals[-1].at_s)
    assert demand.cv == pytest.approx(2.0, rel=0.15)
    assert (demand.prompt_tokens, demand.output_tokens) == (128, 64)
    assert demand_of(arrivals[:1], rate=7.0).rate == 7.0


def test_points_compare_means() -> None:
    point = point_of(2.0)
    assert point.measured == pytest.approx({"ttft_s": 0.3, "tpot_s": 0.15, "latency_s": 0.6})
    assert point.errors["tpot_s"] == pytest.approx(point.prediction.tpot_s / 0.15 - 1)
    at_once = point_of(None)
    assert at_once.measured == pytest.approx({"requests_per_s": 2 / 1.5})
    assert at_once.predicted == {"requests_per_s": at_once.prediction.max_rate}
    errors = [abs(point.errors["ttft_s"]), abs(point_of(1.0).errors["ttft_s"])]
    assert mean_error([point, at_once, point_of(1.0)], "ttft_s") == pytest.approx(sum(errors) / 2)
    assert mean_error([at_once], "ttft_s") is None


def test_a_rate_beyond_the_predicted_capacity_is_told() -> None:
    point = point_of(2.0)
    demand = msgspec.structs.replace(point.demand, rate=1e6)
    split = split_of(status_of(overheads=(0,)), PROFILE)
    prediction = predict(PROFILE, split, demand)
    beyond = Point((), 1e6, demand, prediction, prediction, WAVE, Calibration())
    assert math.isinf(beyond.errors["ttft_s"])
    output = io.StringIO()
    Console(file=output, width=200).print(render([point, point_of(None), beyond]))
    assert "∞" in output.getvalue()
    data = json.loads(json.dumps(to_json([point, beyond], profile=PROFILE, settings={}), allow_nan=False))
    assert data["points"][1]["errors"]["ttft_s"] is None
    assert data["mean_errors"]["ttft_s"] is None


def test_every_split_gets_the_same_arrivals() -> None:
    load = Load(
        rates=(2.0,),
        loads=(),
        seconds=10,
        limits=SchedulerLimits(max_num_seqs=7),
        num_prompt_tokens=8,
        num_output_tokens=4,
        seed=3,
        timeout_s=1,
    )
    assert load.arrivals(2.0) == load.arrivals(2.0)
    assert len(load.arrivals(2.0)) == 20
    assert [arrival.at_s for arrival in load.arrivals(None)] == [0.0] * 7


def test_a_rate_of_zero_is_refused(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("applications: [{args: {}}]")
    profile = tmp_path / "profile.json"
    profile.write_bytes(msgspec.json.encode(PROFILE))
    code = main(["bench", "model", "--config", str(config), "--profile", str(profile), "--rate", "1", "0"])
    assert code == 2
    assert "lowest rate is 0.0" in capsys.readouterr().out


def test_a_point_is_predicted_with_what_was_learnt_before_it() -> None:
    split = split_of(status_of(3, overheads=(1, 2)), PROFILE)
    plain = predict_point(PROFILE, split, ARRIVALS, rate=None, wave=WAVE)
    twice = Calibration(compute=Curve(counts=(1.0,), seconds=(2.0,)))
    slower = predict_point(PROFILE, split, ARRIVALS, rate=None, wave=WAVE, before=twice)
    few = predict_point(PROFILE, split, ARRIVALS, rate=None, wave=WAVE, limits=SchedulerLimits(max_num_seqs=1))
    assert slower.prediction.max_rate < 0.7 * plain.prediction.max_rate
    assert slower.hindsight == plain.prediction
    found = slower.errors["requests_per_s"], slower.errors_in_hindsight["requests_per_s"]
    assert found == pytest.approx([each.max_rate * 1.5 / 2 - 1 for each in (slower.prediction, slower.hindsight)])
    assert mean_error([slower], "requests_per_s", in_hindsight=True) == pytest.approx(abs(found[1]))
    assert few.prediction.max_rate < plain.prediction.max_rate
    assert to_json([slower], profile=PROFILE, settings={})["points"][0]["calibration"]["compute"]["seconds"] == (2.0,)


def test_waves_too_short_for_the_long_run_are_named() -> None:
    calm, at_once = point_of(2.0), point_of(None)
    nearly_full = msgspec.structs.replace(calm.hindsight, utilisation=0.9, latency_s=0.5)
    short = dataclasses.replace(calm, hindsight=nearly_full)
    assert short.settling_s == pytest.approx(5.0)
    assert not short.is_settled
    assert at_once.is_settled
    assert dataclasses.replace(calm, hindsight=msgspec.structs.replace(nearly_full, utilisation=0.1)).is_settled
    assert not dataclasses.replace(calm, hindsight=msgspec.structs.replace(nearly_full, utilisation=1.1)).is_settled
    output = io.StringIO()
    Console(file=output, width=300).print(render([short, at_once]))
    assert "at 90% of its capacity comes to in about 5 s; the wave took 2 s" in output.getvalue()
    assert "long enough to settle: throughput" in output.getvalue()
