"""``GET /metrics``: what Prometheus' own parser makes of it."""

from __future__ import annotations

import httpx
from fake_engine import FakeEngine
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from flexpipe_serve.metrics import EngineMetrics
from flexpipe_serve.prometheus_text import render


def values(text: str) -> dict[tuple[str, ...], float]:
    """All samples by name, pipeline, and the labels that are the metric's own."""
    found: dict[tuple[str, ...], float] = {}
    for family in text_string_to_metric_families(text):
        assert family.documentation
        for sample in family.samples:
            own = [value for key, value in sample.labels.items() if key not in ("app", "model", "pipeline")]
            key = (sample.name, sample.labels["pipeline"], *own)
            assert key not in found
            found[key] = sample.value
    return found


def test_all_kinds_of_several_pipelines() -> None:
    first, second = (EngineMetrics(app="a", model='of "\\\n', pipeline=i) for i in range(2))
    first.on_step(0.03, (0.01, 0.02), num_tokens=4)
    second.on_step(0.05, (0.04,), num_tokens=1)
    first.on_step(700.0, (0.01, 0.03), num_tokens=0)
    text = render(family for metrics in (first, second) for family in metrics.families())
    found = values(text)
    assert found["flexpipe_steps_total", "0"] == 2
    assert found["flexpipe_generation_tokens_total", "1"] == 1
    assert found["flexpipe_preemptions_total", "0"] == 0
    assert found["flexpipe_stage_compute_seconds_total", "0", "1"] == 0.05
    assert found["flexpipe_step_seconds_count", "0"] == found["flexpipe_step_seconds_bucket", "0", "+Inf"] == 2
    assert found["flexpipe_step_seconds_bucket", "0", "0.03"] == 1, "a bucket's end is in it"
    assert found["flexpipe_step_seconds_bucket", "0", "0.02"] == 0
    assert found["flexpipe_step_seconds_sum", "0"] == 700.03
    models = {s.labels["model"] for family in text_string_to_metric_families(text) for s in family.samples}
    assert models == {'of "\\\n'}
    assert text.count("# TYPE flexpipe_steps_total counter") == 1


@given(st.lists(st.lists(st.floats(0, 1000), max_size=8), max_size=6))
def test_nothing_is_lost_or_counted_twice_however_often_it_is_asked_for(rounds: list[list[float]]) -> None:
    metrics = EngineMetrics(app="a", model="m")
    for seconds in rounds:
        for each in seconds:
            metrics.on_step(each, (), num_tokens=1)
        found = values(render(metrics.families()))
    if rounds:
        num = sum(map(len, rounds))
        assert found["flexpipe_step_seconds_count", "0"] == found["flexpipe_generation_tokens_total", "0"] == num
        assert metrics.snapshot().latencies["step_seconds"].num == num
        counts = [value for key, value in found.items() if key[0] == "flexpipe_step_seconds_bucket"]
        assert counts == sorted(counts)


async def test_over_http(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    answer = await client.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert answer.text == engine.metrics_text()
