"""``flexpipe bench refactor`` with a real server of its own."""

import json
from pathlib import Path

import pytest

from flexpipe_serve.cli import main

CONFIG = Path(__file__).parents[2] / "serve_config.yaml"


@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.usefixtures("demo_model")
def test_bench_refactor(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    code = main(
        ["bench", "refactor", "--config", str(CONFIG), "--domains", "private", "--modes", "live", "--kinds", "shift",
         "--warm-stages", "0", "--idle", "1", "--concurrency", "2", "--prompt-tokens", "24", "--output-tokens", "40",
         "--json", str(out), "--server-log", str(tmp_path / "server.log")]
    )  # fmt: skip
    data = json.loads(out.read_text())
    (section,) = data["sections"]
    (trial,) = section["trials"]
    assert code == 0
    assert trial["record"]["outcome"] == "done"
    assert trial["record"]["snapshot_bytes"] > 0
    assert trial["window"]["start_s"] < trial["switched_s"] <= trial["window"]["end_s"]
    assert trial["figures"]["gaps_ms"]["count"] > 0
    assert trial["extra_memory_bytes"] > 0  # weights and KV are there twice meanwhile
    assert (section["num_dropped"], section["differences"]) == (0, [])
