"""``flexpipe bench adapt`` against a real fleet over HTTP; only Ray is left out."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from fleets import running_fleet
from http_server import serve
from profile_cases import profile_of

from flexpipe_serve.async_handle import AsyncHandle
from flexpipe_serve.bench import adapt_run, adapt_server
from flexpipe_serve.bench.adapt_run import AdaptSession, Variant
from flexpipe_serve.bench.arrivals import Arrival
from flexpipe_serve.bench.client import Target
from flexpipe_serve.bench.prompts import PromptBuilder
from flexpipe_serve.bench.serve import first_model
from flexpipe_serve.bench.server import router_of
from flexpipe_serve.cli import main
from flexpipe_serve.config import PlannerConfig
from flexpipe_serve.deployments.api import create_app
from flexpipe_serve.engine.fleet import Fleet
from flexpipe_serve.engine.profile_source import ProfileSource
from flexpipe_serve.pipeline.local_host import LocalStageHost
from flexpipe_serve.transport import HttpTransport

NUM_LAYERS = 4


@pytest.fixture
def fleet(small_model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fleet]:
    """Takes deployments of its planner's configuration, as a Router does."""
    profile = profile_of(layer_scale=(1.0,) * NUM_LAYERS, layer_bytes=(1_000_000,) * NUM_LAYERS)
    monkeypatch.setattr(ProfileSource, "get", lambda self: profile)
    with running_fleet(small_model, LocalStageHost(), num_stages=2) as fleet:

        async def deploy(config: dict[str, Any], *, url: str, log: Path) -> None:
            fleet.set_planner(PlannerConfig(**router_of(config)["user_config"]["planner"]))

        monkeypatch.setattr(adapt_run, "deploy", deploy)
        yield fleet


@pytest.fixture
def config(small_model: Path, tmp_path: Path) -> Path:
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({"applications": [{"args": {"model": {"source": str(small_model)}}}]}))
    return file


def test_bench_adapt(
    fleet: Fleet,
    config: Path,
    small_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    @contextlib.contextmanager
    def running_server(config: dict[str, Any], *, log: Path) -> Iterator[str]:
        with serve(create_app(lambda: fleet)) as url:
            yield url

    monkeypatch.setattr(adapt_server, "running_server", running_server)
    recorded = tmp_path / "recorded.csv"
    rows = [f"{at / 10},{10 + at},{5 + at % 3}" for at in range(60)]
    recorded.write_text("\n".join(["arrival_s,prompt_tokens,output_tokens", *rows]) + "\n")
    out = tmp_path / "out.json"
    code = main(
        ["bench", "adapt", "--config", str(config), "--tokenizer", str(small_model), "--trace", "gamma:1",
         "--trace", str(recorded), "--stages", "1,2", "--policies", "gated", "--warm-stages", "0", "--duration", "0.6",
         "--lead-in", "0.2", "--concurrency", "4", "--prompt-tokens", "16", "--output-tokens", "8", "--rate", "20",
         "--repeats", "2", "--json", str(out), "--plot", str(tmp_path / "plot.png")]
    )  # fmt: skip
    printed = capsys.readouterr().out
    traces = json.loads(out.read_text())["traces"]
    assert code == 0
    assert [trace["trace"] for trace in traces] == ["gamma, CV 1", "recorded"]
    assert set(traces[0]["capacity_per_s"]) == {"static 1", "static 2"}
    for trace in traces:
        assert trace["differences"] == []
        assert len(trace["arrivals"]) == 16
        for name in ("static 1", "static 2", "gated"):
            runs = trace["variants"][name]
            assert [run["repeat"] for run in runs] == [0, 1]
            assert all(run["figures"]["num_lost"] == 0 for run in runs)
            assert all(bool(run["decisions"]) <= (name == "gated") for run in runs)
        for num_stages in (1, 2):
            runs = trace["variants"][f"static {num_stages}"]
            assert {look["num_stages"] for run in runs for look in run["looks"]} == {num_stages}
    # The second repetition comes after the whole first one, in reverse, and layouts change seldom.
    started = {(name, run["repeat"]): run["started_at"] for name, runs in traces[0]["variants"].items() for run in runs}
    assert sorted(started, key=started.__getitem__) == [
        ("static 1", 0), ("gated", 0), ("static 2", 0), ("static 2", 1), ("gated", 1), ("static 1", 1),
    ]  # fmt: skip
    second = {name: runs[0]["started_at"] for name, runs in traces[1]["variants"].items()}
    assert sorted(second, key=second.__getitem__) == ["static 2", "gated", "static 1"]
    assert second["static 1"] < started["static 2", 1]
    assert "FlexPipe's paper has -38.3%" in printed.replace("\n", " ")
    assert "best static layout in hindsight" in printed
    assert len(list(tmp_path.glob("plot-*.png"))) == 2


async def test_a_scripted_variant_moves_when_told(fleet: Fleet, small_model: Path, tmp_path: Path) -> None:
    prompt = PromptBuilder(small_model).build(16, np.random.default_rng(1))
    with serve(create_app(lambda: fleet)) as url:
        target = Target("flexpipe", url, model=first_model(Target("flexpipe", url, model="")))
        async with AsyncHandle(HttpTransport(url)) as handle:
            session = AdaptSession(
                config={"applications": [{"deployments": [{"name": "Router", "user_config": {}}]}]},
                url=url,
                log=tmp_path / "log",
                handle=handle,
                target=target,
                planner={},
                warm_prompt=prompt,
                timeout_s=60,
            )
            workload = [Arrival(0.1 * index, 16, 8) for index in range(20)]
            variant = Variant("scripted", (1,), moves=((0.5, (3,)),))
            runs = [await session.run(variant, workload, [prompt] * 20, repeat=repeat) for repeat in range(2)]
    for run in runs:
        assert all(request.error is None for request in run.wave.requests)
        (moved,) = run.records
        assert [part.start for part in moved.plan.new] == [0, 3]
        assert moved.requested_at - run.started_at >= 0.4  # clocks differ a little
        assert run.looks[0].boundaries == (1,)
