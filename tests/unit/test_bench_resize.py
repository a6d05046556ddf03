"""Budgets, requests and report of the resize experiment."""

import io
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from status_samples import pipeline_status, server_status, stage
from test_bench_summary import record as request
from test_bench_windows import record as refactoring

from flexpipe_serve.bench.resize_plan import Profile, plan_resize, stepped_arrivals
from flexpipe_serve.bench.resize_report import mean_ttft_ratio, render, save_picture, summary_of, to_json
from flexpipe_serve.bench.resize_run import Calibration, KVSample, ResizeRun
from flexpipe_serve.bench.wave import Wave
from flexpipe_serve.errors import ConfigError
from flexpipe_serve.kv.capacity import StageFootprint, blocks_by_domain

MIB = 1 << 20
PROFILE = Profile(
    boundary=15,
    num_layers=30,
    weights_bytes=(310 * MIB, 320 * MIB),
    overhead_bytes=(260 * MIB, 250 * MIB),
    layer_bytes=14 * MIB,
    block_bytes=24_576,
    block_size=16,
)


def capacities(boundary: int, budgets: tuple[int, int]) -> dict[str, int]:
    """Blocks by stage, as the server counts them."""
    moved = (boundary - PROFILE.boundary) * PROFILE.layer_bytes
    num_layers = (boundary, PROFILE.num_layers - boundary)
    weights = (PROFILE.weights_bytes[0] + moved, PROFILE.weights_bytes[1] - moved)
    footprints = [
        StageFootprint(
            stage=str(i), domain=str(i), num_layers=num_layers[i], weights_bytes=weights[i],
            overhead_bytes=PROFILE.overhead_bytes[i],
        )
        for i in range(2)
    ]  # fmt: skip
    return blocks_by_domain(
        footprints=footprints, budgets={str(i): budgets[i] for i in range(2)}, block_bytes=PROFILE.block_bytes
    )


@given(old=st.integers(1, 25), num_blocks=st.integers(20, 400), growth=st.floats(1.1, 6))
def test_the_budgets_give_the_capacities(old: int, num_blocks: int, growth: float) -> None:
    try:
        plan = plan_resize(PROFILE, old=old, num_blocks=num_blocks, growth=growth)
    except ConfigError:
        return
    before, after = capacities(old, plan.budgets), capacities(plan.new, plan.budgets)
    assert min(before.values()) == before["1"]
    assert num_blocks <= before["1"] <= num_blocks + 5 * MIB // ((30 - old) * PROFILE.block_bytes)
    assert after["1"] >= plan.new_blocks >= growth * num_blocks
    assert after["0"] >= plan.new_blocks  # the first stage does not limit
    nearer = capacities(plan.new - 1, plan.budgets)["1"] if plan.new - 1 > old else 0
    assert nearer < growth * num_blocks + 5 * MIB // ((30 - plan.new) * PROFILE.block_bytes)


def test_a_growth_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match="no room for 900 times"):
        plan_resize(PROFILE, old=12, num_blocks=100, growth=900)


def test_profile_from_a_status() -> None:
    first = stage(layers=(0, 12), num_layers=12, weights_bytes=5, overhead_bytes=7, kv_bytes=12 * 10 * 24_576)
    second = stage(layers=(12, 30), num_layers=18, weights_bytes=6, overhead_bytes=8)
    status = server_status(pipeline_status([12], stages=[first, second], kv={"num_blocks": 10}))
    assert Profile.of(status, layer_bytes=3) == Profile(12, 30, (5, 6), (7, 8), 3, 24_576, 16)
    with pytest.raises(ConfigError, match="has 1 stages"):
        Profile.of(server_status(), layer_bytes=3)


def test_arrivals_step_up() -> None:
    settings: dict = {
        "low_rate": 1.0, "high_rate": 10.0, "low_s": 500.0, "high_s": 500.0, "prompt_tokens": (128, 256),
        "num_output_tokens": 9,
    }  # fmt: skip
    found = stepped_arrivals(**settings, cv=1.0, seed=5)
    assert found == stepped_arrivals(**settings, cv=1.0, seed=5)
    assert found != stepped_arrivals(**settings, cv=1.0, seed=6)
    times = [arrival.at_s for arrival in found]
    assert times == sorted(times)
    assert sum(at_s < 500 for at_s in times) == pytest.approx(500, rel=0.2)
    assert sum(at_s >= 500 for at_s in times) == pytest.approx(5000, rel=0.1)
    assert times[-1] < 1000
    assert {min(a.num_prompt_tokens for a in found), max(a.num_prompt_tokens for a in found)} == {128, 256}


def run(*, resize_kv: bool, ttfts_s: list[float], round_index: int = 0, **more: object) -> ResizeRun:
    """One request each 10 s; the rate steps up at 15 s."""
    requests = [request(10.0 * i, 10.0 * i + ttft_s, 10.0 * i + ttft_s + 1) for i, ttft_s in enumerate(ttfts_s)]
    samples = tuple(KVSample(float(t), 100 if t < 15 or not resize_kv else 400, 50, 1, 0) for t in range(30))
    wave = Wave("flexpipe", 0.0, tuple(requests), 0.1)
    return ResizeRun(resize_kv, round_index, wave, refactoring(num_blocks=400, **more), 15.0, samples, 2)


RUNS = [
    run(resize_kv=True, ttfts_s=[1.0, 1.0, 1.0, 3.0]),
    run(resize_kv=False, ttfts_s=[1.0, 1.0, 7.0, 9.0]),
    run(resize_kv=False, ttfts_s=[1.0, 1.0, 3.0, 3.0], round_index=1),
    run(resize_kv=True, ttfts_s=[1.0, 1.0, 1.0, 1.0], round_index=1),
]


def test_ratio_of_the_means() -> None:
    found = mean_ttft_ratio(RUNS, after_step=False)
    assert found is not None
    assert (found.low, found.high) == pytest.approx((2, 18 / 6))
    after = mean_ttft_ratio(RUNS, after_step=True)
    assert after is not None
    assert (after.low, after.high) == pytest.approx((3, 4))
    assert mean_ttft_ratio(RUNS[:1], after_step=False) is None
    summary = summary_of(RUNS[1], after_step=True)
    assert summary is not None
    assert summary.num_requests == 2


def test_report(tmp_path: Path) -> None:
    failed = run(resize_kv=True, ttfts_s=[1.0], round_index=2, error="lost stage-1")
    text = io.StringIO()
    Console(file=text, width=200).print(render([*RUNS, failed]))
    assert "off / on: 2.50 [2.00-3.00]" in text.getvalue()
    assert "lost stage-1" in text.getvalue()
    plan = plan_resize(PROFILE, old=12, num_blocks=100, growth=4)
    data = to_json(RUNS, plan=plan, calibration=Calibration(PROFILE, 0.4, 0.8), settings={})
    data = json.loads(json.dumps(data))
    assert data["mean_ttft_ratio"]["after_step"]["median"] == pytest.approx(3.5)
    assert data["runs"][0]["kv"][20]["num_blocks"] == 400
    save_picture(RUNS, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
