"""``flexpipe bench adapt`` with a server of its own: it is started, takes a policy while it runs, and is gone."""

import json
import os
from pathlib import Path

import pytest
import yaml

from flexpipe_serve.cli import main

CONFIG = Path(__file__).parents[2] / "serve_config.yaml"


@pytest.mark.cluster
@pytest.mark.slow
def test_bench_adapt(small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        monkeypatch.delenv(name)  # what the Ray of other tests left in this process is not for the server
    config = yaml.safe_load(CONFIG.read_text())
    config["applications"][0]["args"]["model"]["source"] = str(small_model)
    file, out = tmp_path / "config.yaml", tmp_path / "out.json"
    file.write_text(yaml.safe_dump(config))
    code = main(
        ["bench", "adapt", "--config", str(file), "--tokenizer", str(small_model), "--trace", "gamma:2",
         "--stages", "1", "--policies", "gated", "--start", "1", "--warm-stages", "0", "--duration", "2",
         "--lead-in", "0.5", "--concurrency", "2", "--prompt-tokens", "16", "--output-tokens", "8", "--rate", "8",
         "--repeats", "1", "--planner", '{"interval_s": 0.2}', "--json", str(out),
         "--server-log", str(tmp_path / "server.log")]
    )  # fmt: skip
    (trace,) = json.loads(out.read_text())["traces"]
    assert code == 0
    assert trace["differences"] == []
    (static,), (gated,) = trace["variants"]["static 1"], trace["variants"]["gated"]
    assert static["figures"]["num_lost"] == gated["figures"]["num_lost"] == 0
    assert {look["num_stages"] for look in static["looks"]} == {1}
    assert static["decisions"] == []
    assert gated["decisions"]
