"""``flexpipe bench model`` against a real engine over HTTP; only Ray is left out."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from fleets import running_fleet
from http_server import serve
from profile_cases import profile_of

from flexpipe_serve.bench import model_run
from flexpipe_serve.cli import main
from flexpipe_serve.deployments.api import create_app
from flexpipe_serve.model.profile_cache import write_profile
from flexpipe_serve.pipeline.local_host import LocalStageHost


@pytest.fixture
def config(small_model: Path, tmp_path: Path) -> Path:
    file = tmp_path / "config.yaml"
    app = {"args": {"model": {"source": str(small_model)}, "scheduler": {"max_num_seqs": 6}}}
    file.write_text(yaml.safe_dump({"applications": [app]}))
    return file


@pytest.fixture
def _server(small_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextlib.contextmanager
    def running_server(config: dict[str, Any], *, log: Path) -> Iterator[str]:
        with running_fleet(small_model, LocalStageHost()) as fleet, serve(create_app(lambda: fleet)) as url:
            yield url

    monkeypatch.setattr(model_run, "running_server", running_server)


@pytest.mark.usefixtures("_server")
def test_bench_model(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    profile, out, plot = tmp_path / "profile.json", tmp_path / "out.json", tmp_path / "out.png"
    write_profile(profile_of(layer_scale=(1.0,) * 4, layer_bytes=(1_000_000,) * 4), profile)
    code = main(
        ["bench", "model", "--config", str(config), "--profile", str(profile), "--stages", "1", "2", "--load", "0.4",
         "--seconds", "0.4", "--prompt-tokens", "24", "--output-tokens", "8", "--json", str(out), "--plot", str(plot)]
    )  # fmt: skip
    data = json.loads(out.read_text())
    printed = capsys.readouterr().out
    assert code == 0
    rate = 0.4 * data["points"][0]["measured"]["requests_per_s"]
    num_requests = max(2, round(0.4 * rate))
    assert [(p["num_stages"], p["rate"], p["summary"]["num_requests"]) for p in data["points"]] == [
        (1, None, 6), (1, rate, num_requests), (2, None, 6), (2, rate, num_requests),
    ]  # fmt: skip
    timed, at_once = data["points"][1], data["points"][2]
    assert at_once["boundaries"] == [2]
    for name in ("ttft_s", "tpot_s", "latency_s"):
        assert timed["measured"][name] > 0
        predicted = timed["predicted"][name]  # None: too much for what the profile says
        error = None if predicted is None else pytest.approx(predicted / timed["measured"][name] - 1)
        assert timed["errors"][name] == error
    assert timed["measured"]["latency_s"] > timed["measured"]["ttft_s"]
    assert at_once["predicted"] == {"requests_per_s": at_once["max_rate"]}
    assert all(point["summary"]["num_wrong_prompts"] == 0 for point in data["points"])
    assert "mean relative error: TTFT" in printed.replace("\n", " ")
    assert plot.read_bytes().startswith(b"\x89PNG")
