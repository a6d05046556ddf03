"""``flexpipe bench adapt`` with a real server of its own."""

import json
import os
from pathlib import Path

import pytest

from flexpipe_serve.cli import main

CONFIG = Path(__file__).parents[2] / "serve_config.yaml"


@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.usefixtures("demo_model")
def test_bench_adapt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        monkeypatch.delenv(name)  # what the Ray of other tests left in this process is not for the server
    out = tmp_path / "out.json"
    code = main(
        ["bench", "adapt", "--config", str(CONFIG), "--trace", "gamma:2", "--stages", "1,2", "--policies", "",
         "--start", "1", "--warm-stages", "0", "--duration", "2", "--lead-in", "1", "--concurrency", "2",
         "--prompt-tokens", "16", "--output-tokens", "8", "--rate", "3",
         "--json", str(out), "--plot", str(tmp_path / "plot.png"), "--server-log", str(tmp_path / "server.log")]
    )  # fmt: skip
    (trace,) = json.loads(out.read_text())["traces"]
    assert code == 0
    assert trace["differences"] == []
    assert set(trace["capacity_per_s"]) == {"static 1", "static 2"}
    for name, num_stages in (("static 1", 1), ("static 2", 2)):
        (run,) = trace["variants"][name]
        assert {look["num_stages"] for look in run["looks"]} == {num_stages}
        assert run["refactorings"] == []
        assert run["figures"]["num_lost"] == 0
        assert run["figures"]["stage_s"] == pytest.approx(num_stages * run["figures"]["device_s"])
    assert list(tmp_path.glob("plot-*.png"))
