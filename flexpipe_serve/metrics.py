"""What the engine measures, for Ray's metrics (dashboard, Prometheus), ``GET /metrics`` and ``GET /flexpipe/status``.

Ray takes 3 to 10 microseconds a record, so the engine's calls only append to lists; :meth:`EngineMetrics.flush`
records once a second.
"""

from __future__ import annotations

import sys
import threading
from bisect import bisect_left
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from flexpipe_serve.prometheus_text import Family, Sample, histogram_samples
from flexpipe_serve.refactor.record import Outcome

if TYPE_CHECKING:
    from flexpipe_serve.engine.outputs import FinishReason
    from flexpipe_serve.engine.request import Sequence as EngineSequence
    from flexpipe_serve.engine.request import SequenceUpdate
    from flexpipe_serve.engine.scheduler_config import SchedulerStats
    from flexpipe_serve.pipeline.stage_types import StageReport
    from flexpipe_serve.refactor.record import RefactorRecord

FLUSH_INTERVAL_S = 1.0
_MAX_OBSERVATIONS = 500
"""Of one histogram and flush. Of more, evenly spaced ones are recorded: the shape stays right, the count does not."""
_NUM_RECENT = 1000
"""Observations the percentiles of the snapshot are taken from."""

_TAGS = ("app", "model", "pipeline")
# fmt: off
_SECONDS = (
    0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75,
    1.0, 1.5, 2.0, 3.0, 5.0, 7.5, 10.0, 15.0, 20.0, 30.0, 60.0,
)
# fmt: on
_LONG_SECONDS = (*_SECONDS, 120.0, 300.0, 600.0)
_STOP_SECONDS = (0.0001, 0.0002, 0.0005, *_SECONDS)
_COUNTERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "sequences_finished": ("Sequences that ended (a request has n of them), by finish reason.", ("finish_reason",)),
    "prompt_tokens": ("Prompt tokens of the sequences admitted, cached ones included.", ()),
    "prefix_cache_hit_tokens": ("Prompt tokens found in the prefix cache.", ()),
    "generation_tokens": ("Tokens sampled.", ()),
    "preemptions": ("Times a sequence lost its KV to one of higher rank and was computed again.", ()),
    "steps": ("Steps completed.", ()),
    "refactorings": ("Refactorings that ended, by outcome; dry runs left out.", ("outcome",)),
    "refactor_copied_bytes": ("KV copied by refactorings, by kind: snapshot, patch.", ("kind",)),
    "stage_compute_seconds": ("Time a stage computed; its rate is the stage's utilisation.", ("stage",)),
}
_GAUGES: dict[str, tuple[str, tuple[str, ...]]] = {
    "running_sequences": ("Sequences that hold KV.", ()),
    "waiting_sequences": ("Sequences in the queue.", ()),
    "kv_used_ratio": ("Share of the KV blocks that running sequences hold.", ()),
    "epoch": ("Number of the layout in force.", ()),
    "stages": ("Stages of the pipeline.", ()),
    "stage_layers": ("Layers a stage holds.", ("stage",)),
    "stage_memory_bytes": ("Memory of a stage, by kind: weights, kv, overhead.", ("stage", "kind")),
}
_HISTOGRAMS: dict[str, tuple[str, tuple[float, ...]]] = {
    "queue_seconds": ("From arrival to the first step of a sequence.", _SECONDS),
    "time_to_first_token_seconds": ("From arrival to the first token of a sequence.", _SECONDS),
    "inter_token_seconds": ("Between two tokens of a sequence.", _SECONDS),
    "time_per_output_token_seconds": ("Mean time between the tokens of a sequence, the first left out.", _SECONDS),
    "sequence_seconds": ("From arrival to the end of a sequence.", _LONG_SECONDS),
    "step_seconds": ("From sending a step to its result.", _SECONDS),
    "refactor_seconds": ("A refactoring from its request to its end; refused ones left out.", _LONG_SECONDS),
    "refactor_stop_seconds": ("Time in which a refactoring held steps back; refused ones left out.", _STOP_SECONDS),
}


class Latency(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A time that is measured, in seconds; None where there is nothing yet.

    Percentiles are observed values: 99 % of the observations do not exceed p99.
    """

    num: int
    """Observations since the start. The other figures are of the last 1000."""
    mean: float | None = None
    p50: float | None = None
    p90: float | None = None
    p99: float | None = None
    max: float | None = None


class MetricsSnapshot(msgspec.Struct, frozen=True, kw_only=True):
    """What a pipeline measured."""

    counters: dict[str, float | dict[str, float]]
    """Totals since the start; of one with a tag, by the tag's value."""
    latencies: dict[str, Latency]


_Key = tuple[str, ...]
"""A counter or gauge and the values of its own tags."""


class MetricsBackend(Protocol):
    """Where metrics are recorded; the module ``ray.util.metrics`` is one."""

    Counter: Any
    Gauge: Any
    Histogram: Any


class EngineMetrics:
    """The metrics of one engine: ``flexpipe_*`` with the tags app, model and pipeline.

    The ``on_*`` calls belong to the engine's thread and cost about a microsecond; all methods may be called from any
    thread.

    Args:
        app: name of the application.
        model: name of the model.
        pipeline: number of the pipeline.
        backend: by default Ray, where it is running in this process; without, only snapshots are kept.
    """

    def __init__(self, *, app: str, model: str, pipeline: int = 0, backend: MetricsBackend | None = None) -> None:
        backend = backend or _ray_backend()
        self._tags = {"app": app, "model": model, "pipeline": str(pipeline)}
        self._metrics = {} if backend is None else _create(backend, self._tags)
        self._lock = threading.Lock()
        self._last_flush = 0.0
        # Since the last flush.
        self._increments: defaultdict[_Key, float] = defaultdict(int)
        self._observations: dict[str, list[float]] = {name: [] for name in _HISTOGRAMS}
        self._gauges: dict[_Key, float] = {}
        # Since the start.
        self._totals: defaultdict[_Key, float] = defaultdict(int)
        self._buckets = {name: [0] * (len(bounds) + 1) for name, (_, bounds) in _HISTOGRAMS.items()}
        self._sums = dict.fromkeys(_HISTOGRAMS, 0.0)
        self._recent = {name: deque[float](maxlen=_NUM_RECENT) for name in _HISTOGRAMS}
        self._shown: dict[_Key, float] = {}
        """Gauges as they stand."""

    def on_step(self, step_seconds: float, stage_seconds: Sequence[float], *, num_tokens: int) -> None:
        """A step's result is there.

        Args:
            step_seconds: since the step was sent.
            stage_seconds: compute time of each stage, in pipeline order.
            num_tokens: tokens sampled.
        """
        with self._lock:
            self._observations["step_seconds"].append(step_seconds)
            self._increments["steps",] += 1
            self._increments["generation_tokens",] += num_tokens
            for stage, seconds in enumerate(stage_seconds):
                self._increments["stage_compute_seconds", str(stage)] += seconds

    def on_tokens(self, updates: Sequence[SequenceUpdate], *, now: float) -> None:
        """What a step brought to its sequences; to be called before the ends that follow from it."""
        with self._lock:
            for update in updates:
                if update.new_token_ids:
                    self._on_token(update.sequence, now)

    def _on_token(self, seq: EngineSequence, now: float) -> None:
        last = seq.last_token_time
        if last is not None:
            self._observations["inter_token_seconds"].append(now - last)
        else:
            self._observations["time_to_first_token_seconds"].append(now - seq.arrival_time)
            if seq.first_scheduled_time is not None:
                self._observations["queue_seconds"].append(seq.first_scheduled_time - seq.arrival_time)
        seq.last_token_time = now

    def on_sequence_finished(self, seq: EngineSequence, finish_reason: FinishReason) -> None:
        """A sequence ended; only one that came to its own end (stop, length) counts in the latencies."""
        with self._lock:
            self._increments["sequences_finished", finish_reason] += 1
            last_token = seq.last_token_time
            if finish_reason not in ("stop", "length"):
                return
            if seq.finish_time is not None:
                self._observations["sequence_seconds"].append(seq.finish_time - seq.arrival_time)
            if last_token is not None and seq.first_token_time is not None and seq.num_output_tokens > 1:
                mean = (last_token - seq.first_token_time) / (seq.num_output_tokens - 1)
                self._observations["time_per_output_token_seconds"].append(mean)

    def on_refactoring(self, record: RefactorRecord) -> None:
        """A refactoring is over; once for each, not for dry runs."""
        with self._lock:
            self._increments["refactorings", record.outcome.value] += 1
            if record.outcome is Outcome.REFUSED:
                return
            self._increments["refactor_copied_bytes", "snapshot"] += record.snapshot_bytes
            self._increments["refactor_copied_bytes", "patch"] += record.patch_bytes
            self._observations["refactor_seconds"].append(record.seconds)
            self._observations["refactor_stop_seconds"].append(record.stop_seconds)

    def set_gauges(self, stats: SchedulerStats, reports: Sequence[StageReport], *, epoch: int) -> None:
        """The state of the scheduler and of the stages (in pipeline order); now and then."""
        gauges: dict[_Key, float] = {
            ("running_sequences",): stats.num_running,
            ("waiting_sequences",): stats.num_waiting,
            ("kv_used_ratio",): stats.num_used_blocks / max(1, stats.num_blocks),
            ("epoch",): epoch,
            ("stages",): len(reports),
        }
        for stage, report in enumerate(reports):
            gauges["stage_layers", str(stage)] = report.stop - report.start
            gauges["stage_memory_bytes", str(stage), "weights"] = report.weights_bytes
            gauges["stage_memory_bytes", str(stage), "kv"] = report.kv_bytes
            gauges["stage_memory_bytes", str(stage), "overhead"] = report.overhead_bytes
        with self._lock:
            self._show(gauges)
            self._raise_to("prompt_tokens", stats.num_prompt_tokens)
            self._raise_to("prefix_cache_hit_tokens", stats.num_prefix_hit_tokens)
            self._raise_to("preemptions", stats.num_preemptions)

    def _show(self, gauges: dict[_Key, float]) -> None:
        # Ray shows a gauge's last value until the next: stages that are gone must be set to 0.
        self._gauges |= dict.fromkeys(self._shown, 0.0) | gauges
        self._shown = gauges

    def _raise_to(self, counter: str, total: int) -> None:
        """Count what is missing to the scheduler's own count since its start."""
        key = (counter,)
        self._increments[key] += total - self._totals[key] - self._increments[key]

    def flush(self, now: float) -> None:
        """Record what came in, if the last time is at least FLUSH_INTERVAL_S ago.

        Args:
            now: seconds of a clock that never goes back.
        """
        if now - self._last_flush >= FLUSH_INTERVAL_S:
            self._last_flush = now
            self._flush()

    def end(self) -> None:
        """The pipeline is gone: its gauges are 0."""
        with self._lock:
            self._show({})
        self._flush()

    def _flush(self) -> None:
        with self._lock:
            increments, self._increments = self._increments, defaultdict(int)
            gauges, self._gauges = self._gauges, {}
            observations, self._observations = self._observations, {name: [] for name in _HISTOGRAMS}
            for key, value in increments.items():
                self._totals[key] += value
            for name, values in observations.items():
                self._recent[name].extend(values)
                self._sums[name] += sum(values)
                for value in values:
                    self._buckets[name][bisect_left(_HISTOGRAMS[name][1], value)] += 1
        if self._metrics:
            self._record(increments, gauges, observations)

    def _record(
        self, increments: Mapping[_Key, float], gauges: Mapping[_Key, float], observations: Mapping[str, list[float]]
    ) -> None:
        for (name, *tags), value in increments.items():
            if value > 0:
                self._metrics[name].inc(value, dict(zip(_COUNTERS[name][1], tags, strict=True)))
        for (name, *tags), value in gauges.items():
            self._metrics[name].set(value, dict(zip(_GAUGES[name][1], tags, strict=True)))
        for name, values in observations.items():
            stride = max(1, -(-len(values) // _MAX_OBSERVATIONS))
            for value in values[::stride]:
                self._metrics[name].observe(value)

    def snapshot(self) -> MetricsSnapshot:
        """As of now."""
        with self._lock:
            totals = self._totals.copy()
            for key, value in self._increments.items():
                totals[key] += value
            recent = {name: [*self._recent[name], *self._observations[name]][-_NUM_RECENT:] for name in _HISTOGRAMS}
            counts = {name: sum(self._buckets[name]) + len(self._observations[name]) for name in _HISTOGRAMS}
        counters: dict[str, Any] = {name: {} if tags else 0 for name, (_, tags) in _COUNTERS.items()}
        for (name, *tags), total in totals.items():
            if tags:
                counters[name][tags[0]] = total
            else:
                counters[name] = total
        latencies = {name: _summary(counts[name], values) for name, values in recent.items()}
        return MetricsSnapshot(counters=counters, latencies=latencies)

    def families(self) -> list[Family]:
        """All metrics since the start, for Prometheus."""
        self._flush()
        with self._lock:
            families = [
                Family(
                    f"flexpipe_{name}_total",
                    "counter",
                    description,
                    self._samples({**({} if tags else {(name,): 0.0}), **self._totals}, name, tags),
                )
                for name, (description, tags) in _COUNTERS.items()
            ]
            families += [
                Family(f"flexpipe_{name}", "gauge", description, self._samples(self._shown, name, tags))
                for name, (description, tags) in _GAUGES.items()
            ]
            for name, (description, bounds) in _HISTOGRAMS.items():
                samples = histogram_samples(
                    self._tags, bounds=bounds, counts=self._buckets[name], total=self._sums[name]
                )
                families.append(Family(f"flexpipe_{name}", "histogram", description, samples))
        return families

    def _samples(self, values: Mapping[_Key, float], name: str, tags: Sequence[str]) -> list[Sample]:
        return [
            Sample({**self._tags, **dict(zip(tags, own, strict=True))}, value)
            for (other, *own), value in values.items()
            if other == name
        ]


def _create(backend: MetricsBackend, default_tags: dict[str, str]) -> dict[str, Any]:
    metrics: dict[str, Any] = {}
    for name, (description, tags) in _COUNTERS.items():
        metrics[name] = backend.Counter(f"flexpipe_{name}", description=description, tag_keys=(*_TAGS, *tags))
    for name, (description, tags) in _GAUGES.items():
        metrics[name] = backend.Gauge(f"flexpipe_{name}", description=description, tag_keys=(*_TAGS, *tags))
    for name, (description, boundaries) in _HISTOGRAMS.items():
        metrics[name] = backend.Histogram(
            f"flexpipe_{name}", description=description, boundaries=list(boundaries), tag_keys=_TAGS
        )
    for metric in metrics.values():
        metric.set_default_tags(default_tags)
    return metrics


def _ray_backend() -> MetricsBackend | None:
    """Ray's metrics where this process is part of a Ray cluster; without importing Ray where it is not."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return None
    from ray.util import metrics

    backend: MetricsBackend = metrics
    return backend


def _summary(count: int, values: Sequence[float]) -> Latency:
    if not values:
        return Latency(num=0)
    ordered = sorted(values)
    p50, p90, p99 = (ordered[-(-len(ordered) * p // 100) - 1] for p in (50, 90, 99))
    return Latency(num=count, mean=sum(ordered) / len(ordered), p50=p50, p90=p90, p99=p99, max=ordered[-1])
