"""Engine metrics against a backend that remembers what it was told, and against Ray's own classes."""

from __future__ import annotations

import subprocess
import sys
from collections import defaultdict
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexpipe_serve.engine.request import Sequence, SequenceUpdate
from flexpipe_serve.engine.sampling_params import SamplingParams
from flexpipe_serve.engine.scheduler_config import SchedulerStats
from flexpipe_serve.metrics import EngineMetrics, Latency, MetricsSnapshot
from flexpipe_serve.refactor.record import Mode, Outcome, Phase, RefactorPlan, RefactorRecord


class FakeMetric:
    def __init__(
        self, name: str, *, description: str, tag_keys: tuple[str, ...], boundaries: list[float] | None = None
    ) -> None:
        assert description.endswith(".")
        self.name = name
        self.tag_keys = tag_keys
        self.boundaries = boundaries
        self.default_tags: dict[str, str] = {}
        self.records: defaultdict[tuple[str, ...], list[float]] = defaultdict(list)

    def set_default_tags(self, tags: dict[str, str]) -> None:
        self.default_tags = tags

    def _record(self, value: float, tags: dict[str, str] | None = None) -> None:
        tags = self.default_tags | (tags or {})
        assert tuple(tags) == self.tag_keys
        assert all(isinstance(tag, str) for tag in tags.values())
        self.records[tuple(tags.values())].append(value)

    inc = set = observe = _record


class FakeBackend:
    def __init__(self) -> None:
        self.metrics: dict[str, FakeMetric] = {}

    def _create(self, name: str, **options: Any) -> FakeMetric:
        assert name not in self.metrics
        self.metrics[name] = FakeMetric(name, **options)
        return self.metrics[name]

    Counter = Gauge = Histogram = property(lambda self: self._create)  # type: ignore[assignment]

    def __getitem__(self, name: str) -> dict[tuple[str, ...], list[float]]:
        """Records by the values of the metric's own tags."""
        records = self.metrics[f"flexpipe_{name}"].records
        assert all(tags[:3] == ("chat", "demo", "0") for tags in records)
        return {tags[3:]: values for tags, values in records.items()}


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend()


@pytest.fixture
def metrics(backend: FakeBackend) -> EngineMetrics:
    return EngineMetrics(app="chat", model="demo", backend=backend)


def sequence(arrival_time: float = 100.0) -> Sequence:
    return Sequence(
        request_id="r", prompt_token_ids=[1, 2, 3], params=SamplingParams(max_tokens=10), arrival_time=arrival_time
    )


def generate(metrics: EngineMetrics, seq: Sequence, times: list[float]) -> None:
    """Let ``seq`` be scheduled at the first of ``times`` and get a token at each of the others."""
    seq.first_scheduled_time = times[0]
    for now in times[1:]:
        seq.tokens.append(5)
        seq.first_token_time = seq.first_token_time or now
        metrics.on_tokens([SequenceUpdate(sequence=seq, new_token_ids=(5,))], now=now)


def stats(**values: int) -> SchedulerStats:
    names = SchedulerStats.__dataclass_fields__
    return SchedulerStats(**(dict.fromkeys(names, 0) | values))


def report(start: int, stop: int) -> Any:
    return SimpleNamespace(
        start=start, stop=stop, weights_bytes=10 * (stop - start), kv_bytes=stop - start, overhead_bytes=7
    )


def test_latencies_of_a_sequence(metrics: EngineMetrics, backend: FakeBackend) -> None:
    seq = sequence(arrival_time=100.0)
    generate(metrics, seq, [100.5, 101.0, 101.25, 102.0])
    metrics.flush(1.0)
    assert backend["queue_seconds"] == {(): [0.5]}
    assert backend["time_to_first_token_seconds"] == {(): [1.0]}
    assert backend["inter_token_seconds"] == {(): [0.25, 0.75]}
    assert backend["sequence_seconds"] == {}
    seq.finish_time = 102.0
    metrics.on_sequence_finished(seq, "stop")
    metrics.flush(2.0)
    assert backend["sequence_seconds"] == {(): [2.0]}
    assert backend["time_per_output_token_seconds"] == {(): [0.5]}
    assert backend["sequences_finished"] == {("stop",): [1]}
    assert backend["queue_seconds"] == {(): [0.5]}, "recorded once"


def test_sequences_that_were_cut_off_count_in_no_latency_of_whole_sequences(
    metrics: EngineMetrics, backend: FakeBackend
) -> None:
    for reason in ("abort", "error", "abort"):
        seq = sequence()
        generate(metrics, seq, [101.0, 102.0, 103.0])
        seq.finish_time = 103.0
        metrics.on_sequence_finished(seq, reason)  # type: ignore[arg-type]
    metrics.on_sequence_finished(sequence(), "abort")
    metrics.flush(1.0)
    assert backend["sequences_finished"] == {("abort",): [3], ("error",): [1]}
    assert backend["sequence_seconds"] == backend["time_per_output_token_seconds"] == {}
    assert len(backend["inter_token_seconds"][()]) == 3


def test_one_token_has_no_time_per_output_token_and_none_no_time_to_first(
    metrics: EngineMetrics, backend: FakeBackend
) -> None:
    for times in ([101.0, 102.0], [101.0]):
        seq = sequence()
        generate(metrics, seq, times)
        seq.finish_time = 103.0
        metrics.on_sequence_finished(seq, "length")
    metrics.on_tokens([SequenceUpdate(sequence=sequence())], now=104.0)
    metrics.flush(1.0)
    assert backend["time_per_output_token_seconds"] == {}
    assert backend["time_to_first_token_seconds"] == {(): [2.0]}
    assert backend["sequence_seconds"] == {(): [3.0, 3.0]}


def test_steps(metrics: EngineMetrics, backend: FakeBackend) -> None:
    metrics.on_step(0.03, (0.01, 0.02), num_tokens=4)
    metrics.on_step(0.05, (0.01, 0.03), num_tokens=0)
    metrics.flush(1.0)
    assert backend["steps"] == {(): [2]}
    assert backend["generation_tokens"] == {(): [4]}
    assert backend["step_seconds"] == {(): [0.03, 0.05]}
    assert backend["stage_compute_seconds"] == {("0",): [0.02], ("1",): [0.05]}
    metrics.on_step(0.05, (0.01,), num_tokens=0)
    metrics.flush(2.0)
    assert backend["generation_tokens"] == {(): [4]}, "Ray refuses an increment of 0"
    assert backend["stage_compute_seconds"] == {("0",): [0.02, 0.01], ("1",): [0.05]}


def test_gauges_and_what_became_of_a_stage_that_is_gone(metrics: EngineMetrics, backend: FakeBackend) -> None:
    scheduler = stats(num_running=3, num_waiting=2, num_blocks=40, num_used_blocks=10)
    metrics.set_gauges(scheduler, [report(0, 10), report(10, 30)], epoch=4)
    metrics.flush(1.0)
    assert backend["running_sequences"] == {(): [3]}
    assert backend["waiting_sequences"] == {(): [2]}
    assert backend["kv_used_ratio"] == {(): [0.25]}
    assert backend["epoch"] == {(): [4]}
    assert backend["stages"] == {(): [2]}
    assert backend["stage_layers"] == {("0",): [10], ("1",): [20]}
    assert backend["stage_memory_bytes"]["1", "weights"] == [200]
    assert backend["stage_memory_bytes"]["1", "kv"] == [20]
    assert backend["stage_memory_bytes"]["1", "overhead"] == [7]
    metrics.set_gauges(stats(), [report(0, 30)], epoch=5)
    metrics.set_gauges(stats(num_running=1), [report(0, 30)], epoch=5)
    metrics.flush(2.0)
    assert backend["stage_layers"] == {("0",): [10, 30], ("1",): [20, 0]}
    assert backend["running_sequences"] == {(): [3, 1]}, "only the newest value is recorded"
    assert backend["kv_used_ratio"] == {(): [0.25, 0.0]}


@given(totals=st.lists(st.integers(0, 50), max_size=12), flushes=st.lists(st.booleans(), min_size=12, max_size=12))
def test_scheduler_counts_are_recorded_once(totals: list[int], flushes: list[bool]) -> None:
    backend = FakeBackend()
    metrics = EngineMetrics(app="chat", model="demo", backend=backend)
    total = 0
    for now, (more, flush) in enumerate(zip(totals, flushes, strict=False), start=1):
        total += more
        metrics.set_gauges(
            stats(num_prompt_tokens=3 * total, num_prefix_hit_tokens=total, num_preemptions=2 * total), [], epoch=1
        )
        if flush:
            metrics.flush(now)
    assert metrics.snapshot().counters["prompt_tokens"] == 3 * total
    metrics.flush(100.0)
    assert sum(backend["prompt_tokens"].get((), [])) == 3 * total
    assert sum(backend["prefix_cache_hit_tokens"].get((), [])) == total
    assert sum(backend["preemptions"].get((), [])) == 2 * total


def refactoring(outcome: Outcome, **fields: Any) -> RefactorRecord:
    plan = RefactorPlan(
        verdict="fits",
        reason="",
        old=(),
        new=(),
        moves=(),
        launched=(),
        retired=(),
        domains=(),
        num_blocks_before=1,
        num_blocks_during=1,
        num_blocks_after=1,
        weights_bytes=0,
        kv_bytes=0,
    )
    return RefactorRecord(
        id="r-1",
        mode=Mode.LIVE,
        reason="requested",
        outcome=outcome,
        phase=Phase.RETIRE,
        plan=plan,
        epoch=2,
        requested_at=0.0,
        **fields,
    )


def test_refactorings(metrics: EngineMetrics, backend: FakeBackend) -> None:
    done = refactoring(Outcome.DONE, seconds=3.0, stop_seconds=0.0004, snapshot_bytes=1000, patch_bytes=10)
    metrics.on_refactoring(done)
    metrics.on_refactoring(refactoring(Outcome.ABORTED, seconds=1.5, snapshot_bytes=500))
    metrics.on_refactoring(refactoring(Outcome.REFUSED, seconds=0.01))
    metrics.on_refactoring(done)
    metrics.flush(1.0)
    assert backend["refactorings"] == {("done",): [2], ("aborted",): [1], ("refused",): [1]}
    assert backend["refactor_copied_bytes"] == {("snapshot",): [2500], ("patch",): [20]}
    assert backend["refactor_seconds"] == {(): [3.0, 1.5, 3.0]}, "a refused one took none of a refactoring's time"
    assert backend["refactor_stop_seconds"] == {(): [0.0004, 0.0, 0.0004]}
    assert metrics.snapshot().counters["refactorings"] == {"done": 2, "aborted": 1, "refused": 1}


def test_flush_keeps_its_interval(metrics: EngineMetrics, backend: FakeBackend) -> None:
    for now, recorded in ((10.0, 1), (10.5, 1), (10.99, 1), (11.0, 2), (11.5, 2), (13.0, 3)):
        metrics.on_step(0.01, (), num_tokens=1)
        metrics.flush(now)
        assert len(backend["steps"][()]) == recorded
    assert sum(backend["steps"][()]) == 6


def test_a_flood_of_observations_is_thinned_evenly(metrics: EngineMetrics, backend: FakeBackend) -> None:
    for number in range(12_345):
        metrics.on_step(number, (), num_tokens=1)
    metrics.flush(1.0)
    recorded = backend["step_seconds"][()]
    assert 400 < len(recorded) <= 500
    assert len({b - a for a, b in pairwise(recorded)}) == 1
    assert backend["steps"] == {(): [12_345]}


def test_snapshot_before_and_after_a_flush_without_a_backend() -> None:
    metrics = EngineMetrics(app="chat", model="demo")
    empty = metrics.snapshot()
    assert empty.counters["sequences_finished"] == {}
    assert empty.counters["steps"] == 0
    assert empty.latencies["inter_token_seconds"] == Latency(num=0)
    for number in range(1, 2001):
        metrics.on_step(number / 1000, (0.5,), num_tokens=2)
        if number == 1500:
            metrics.flush(1.0)
    metrics.on_sequence_finished(sequence(), "abort")
    before = metrics.snapshot()
    metrics.flush(2.0)
    assert metrics.snapshot() == before == msgspec.json.decode(msgspec.json.encode(before), type=MetricsSnapshot)
    assert before.counters["steps"] == 2000
    assert before.counters["generation_tokens"] == 4000
    assert before.counters["sequences_finished"] == {"abort": 1}
    assert before.counters["stage_compute_seconds"] == {"0": 1000.0}
    # Of the last 1000 observations, 1.001 to 2.000 s.
    assert before.latencies["step_seconds"] == Latency(
        num=2000, mean=pytest.approx(1.5005), p50=1.5, p90=1.9, p99=1.99, max=2.0
    )


def test_a_sequence_may_go_on_in_another_pipeline(backend: FakeBackend, metrics: EngineMetrics) -> None:
    other = EngineMetrics(app="chat", model="demo", pipeline=1)
    seq = sequence()
    generate(metrics, seq, [101.0, 102.0])
    generate(other, seq, [106.0, 107.0])
    latencies = other.snapshot().latencies
    assert (latencies["inter_token_seconds"].max, latencies["time_to_first_token_seconds"].num) == (5.0, 0)


def test_nothing_is_shown_of_a_pipeline_that_is_gone(backend: FakeBackend, metrics: EngineMetrics) -> None:
    metrics.set_gauges(stats(num_running=3), [], epoch=7)
    metrics.flush(1.0)
    metrics.end()
    assert backend["running_sequences"] == {(): [3, 0]}
    assert backend["epoch"] == {(): [7, 0]}


def test_ray_accepts_every_metric_and_tag() -> None:
    from ray.util import metrics as ray_metrics

    metrics = EngineMetrics(app="chat", model="demo", backend=ray_metrics)
    seq = sequence()
    generate(metrics, seq, [100.5, 101.0, 101.25])
    seq.finish_time = 101.25
    metrics.on_sequence_finished(seq, "stop")
    metrics.on_step(0.03, (0.01, 0.02), num_tokens=4)
    metrics.on_refactoring(refactoring(Outcome.DONE, seconds=3.0, snapshot_bytes=1000, patch_bytes=10))
    metrics.set_gauges(
        stats(num_prompt_tokens=3, num_prefix_hit_tokens=1, num_preemptions=1, num_blocks=4), [report(0, 30)], epoch=4
    )
    metrics.flush(1.0)


def test_a_plain_process_does_not_import_ray() -> None:
    code = (
        "import sys; from flexpipe_serve.metrics import EngineMetrics; EngineMetrics(app='a', model='m').flush(1.0);"
        "sys.exit('ray' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
