"""The arithmetic of latencies and throughput, and the report made of it."""

import io
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from flexpipe_serve.bench.plot import save_plot
from flexpipe_serve.bench.report import print_report, to_json
from flexpipe_serve.bench.summary import Quantiles, Spread, summarize, tpot_s
from flexpipe_serve.bench.wave import RequestRecord, Wave


def record(start_s: float, *times_s: float, tokens: int | None = None, **more: object) -> RequestRecord:
    fields: dict = {
        "start_s": start_s,
        "sent_s": start_s,
        "end_s": times_s[-1] if times_s else start_s + 1,
        "num_prompt_tokens": 4,
        "server_prompt_tokens": 4,
        "num_output_tokens": len(times_s) if tokens is None else tokens,
        "token_times_s": times_s,
        "finish_reason": "length",
    }
    return RequestRecord(**(fields | more))


FIRST = Wave("a", 100.0, (record(0.0, 0.5, 0.6, 0.9), record(1.0, 1.1, 2.0)), client_cpu_s=0.001)
SECOND = Wave("a", 200.0, (record(0.0, 1.0, tokens=1), record(0.5, error="HTTP 503: busy")), client_cpu_s=0.002)


def test_one_wave_by_hand() -> None:
    summary = summarize([FIRST])
    assert (summary.num_requests, summary.num_errors, summary.num_output_tokens) == (2, 0, 5)
    assert summary.duration_s == pytest.approx(2.0)
    assert summary.output_tokens_per_s == pytest.approx(2.5)
    assert summary.requests_per_s == pytest.approx(1.0)
    assert summary.ttft_ms.p50 == pytest.approx((500 + 100) / 2)
    assert summary.tpot_ms.p50 == pytest.approx((200 + 900) / 2)
    assert summary.gap_ms.max == pytest.approx(900)
    assert summary.gap_ms.count == 3
    assert summary.e2e_ms.max == pytest.approx(1000)
    assert summary.client_cpu_us_per_token == pytest.approx(200)


def test_failures_count_but_never_enter_a_latency() -> None:
    summary = summarize([FIRST, SECOND])
    assert (summary.num_requests, summary.num_errors) == (4, 1)
    assert summary.errors == {"HTTP 503: busy": 1}
    assert summary.ttft_ms.count == 3
    assert summary.tpot_ms.count == 2  # one token has no time per output token
    assert summary.duration_s == pytest.approx(2.0 + 1.5)  # what lies between two waves is not counted
    assert summary.num_output_tokens == 6


def test_only_failures() -> None:
    summary = summarize([Wave("a", 0.0, (record(0.0, error="x"),), client_cpu_s=0.1)])
    assert summary.output_tokens_per_s == 0
    assert summary.ttft_ms == Quantiles(0, None, None, None, None, None)
    assert summary.client_cpu_us_per_token is None


def test_tpot_divides_by_tokens_not_by_pieces() -> None:
    assert tpot_s(record(0.0, 1.0, 2.0, 3.0, tokens=5)) == pytest.approx(0.5)


def test_short_answers_and_wrong_prompts_are_seen() -> None:
    wave = Wave("a", 0.0, (record(0.0, 1.0, 2.0, finish_reason="stop"), record(0.0, 1.0, server_prompt_tokens=5)), 0.0)
    summary = summarize([wave])
    assert (summary.num_short, summary.num_wrong_prompts) == (1, 1)


@given(st.lists(st.floats(0, 1e3), min_size=1))
def test_quantiles_are_ordered_and_within_the_data(values: list[float]) -> None:
    q = Quantiles.of_seconds(values)
    assert None not in (q.p50, q.p90, q.p99, q.max)
    assert min(values) * 1e3 <= q.p50 <= q.p90 <= q.p99 <= q.max == max(values) * 1e3


def test_quantiles_interpolate() -> None:
    q = Quantiles.of_seconds(i / 1e3 for i in range(101))
    assert (q.p50, q.p90, q.p99, q.max, q.mean) == pytest.approx((50, 90, 99, 100, 50))


def test_spread() -> None:
    assert Spread.of([3.0, None, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0)
    assert Spread.of([None]) is None


def test_reports_of_good_and_failed_targets(tmp_path: Path) -> None:
    waves = [FIRST, Wave("b", 150.0, (record(0.0, error="cannot connect: refused"),), 0.0), SECOND]
    text = io.StringIO()
    print_report(waves, Console(file=text, width=200))
    assert "[0.7-2.5]" in text.getvalue()  # tokens/s: 1 token in 1.5 s, 5 in 2 s
    assert "b: 1 failed: cannot connect: refused" in text.getvalue()
    data = json.loads(json.dumps(to_json(waves, settings={"seed": 1}, with_requests=True)))
    assert data["targets"]["a"]["all_rounds"]["num_errors"] == 1
    assert len(data["targets"]["a"]["rounds"]) == 2
    assert data["targets"]["a"]["requests"][0][1]["token_times_s"] == [1.1, 2.0]
    save_plot(waves, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
