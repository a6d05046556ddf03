"""A measured point of ``flexpipe bench model`` beside what the latency model says of it: pure."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from flexpipe_serve.bench.arrivals import Arrival
from flexpipe_serve.bench.summary import Summary, summarize
from flexpipe_serve.bench.wave import Wave
from flexpipe_serve.engine.status import ServerStatus
from flexpipe_serve.planner.calibration import apply
from flexpipe_serve.planner.latency import predict
from flexpipe_serve.planner.profile import ModelProfile
from flexpipe_serve.planner.types import Calibration, Demand, Prediction, SchedulerLimits, Split, StageDevice

_AS_PROFILED = Calibration()
METRICS = {"ttft_s": "TTFT", "tpot_s": "TPOT", "latency_s": "latency", "requests_per_s": "throughput"}
"""Names of figures, and how reports call them. A saturated point has the last one alone."""


@dataclass(frozen=True, slots=True)
class Point:
    """One wave on one split.

    Args:
        boundaries: of the pipeline.
        rate: asked for, requests/s; None: all requests at once, as many as are served together.
        demand: as it came.
        prediction: of the latency model, with what the server had learnt before the wave.
        hindsight: the same with what it learnt from the wave, too: how far a machine's speed had changed since shows
            in the difference.
        wave: what was measured.
        calibration: that ``prediction`` was made with.
    """

    boundaries: tuple[int, ...]
    rate: float | None
    demand: Demand
    prediction: Prediction
    hindsight: Prediction
    wave: Wave
    calibration: Calibration

    @property
    def num_stages(self) -> int:
        return len(self.boundaries) + 1

    @property
    def summary(self) -> Summary:
        """Of the requests."""
        return summarize([self.wave])

    @property
    def measured(self) -> dict[str, float]:
        """Means over the requests, by metric."""
        summary = self.summary
        if self.rate is None:
            return {"requests_per_s": summary.requests_per_s}
        means = {
            "ttft_s": summary.ttft_ms.mean,
            "tpot_s": summary.tpot_ms.mean,
            "latency_s": summary.e2e_ms.mean,
        }
        return {name: mean / 1e3 for name, mean in means.items() if mean is not None}

    @property
    def settling_s(self) -> float:
        """About how long it takes from an empty pipeline to the long run that predictions are of: the nearer to
        capacity, the longer a sequence more or less is felt. 0 where all come at once."""
        if self.rate is None:
            return 0.0
        prediction = self.hindsight
        return math.inf if prediction.utilisation >= 1 else prediction.latency_s / (1 - prediction.utilisation)

    @property
    def is_settled(self) -> bool:
        """Whether the wave was twice as long as that: in a shorter one requests find fewer others than predicted."""
        return self.summary.duration_s >= 2 * self.settling_s

    @property
    def predicted(self) -> dict[str, float]:
        """The same of the model."""
        return self._figures(self.prediction)

    @property
    def errors(self) -> dict[str, float]:
        """Predicted over measured, less one; infinite where the model says that the rate is too high."""
        return self._errors(self.prediction)

    @property
    def errors_in_hindsight(self) -> dict[str, float]:
        """Likewise of ``hindsight``."""
        return self._errors(self.hindsight)

    def _figures(self, prediction: Prediction) -> dict[str, float]:
        if self.rate is None:
            return {"requests_per_s": prediction.max_rate}
        return {"ttft_s": prediction.ttft_s, "tpot_s": prediction.tpot_s, "latency_s": prediction.latency_s}

    def _errors(self, prediction: Prediction) -> dict[str, float]:
        predicted = self._figures(prediction)
        return {name: predicted[name] / value - 1.0 for name, value in self.measured.items()}


def predict_point(
    profile: ModelProfile,
    split: Split,
    arrivals: Sequence[Arrival],
    *,
    rate: float | None,
    wave: Wave,
    limits: SchedulerLimits | None = None,
    before: Calibration = _AS_PROFILED,
    after: Calibration = _AS_PROFILED,
) -> Point:
    """The point of a wave.

    Args:
        rate: at which the arrivals were drawn; None: they came all at once.
        limits: of the server's scheduler.
        before: what the server had learnt before the wave.
        after: and behind it.
    """
    demand = demand_of(arrivals, rate=rate)
    prediction, hindsight = (predict(apply(each, profile), split, demand, limits=limits) for each in (before, after))
    return Point(split.boundaries, rate, demand, prediction, hindsight, wave, before)


def demand_of(arrivals: Sequence[Arrival], *, rate: float | None) -> Demand:
    """The demand that some arrivals are, with the gaps that they have and not those they were drawn from; the nominal
    rate where gaps are too few to tell. With no rate, the least demand: only the capacity is of interest."""
    gaps = np.diff([0.0, *(arrival.at_s for arrival in arrivals)])
    found, cv = rate or 1e-9, 1.0
    if rate is not None and len(gaps) > 1:
        found = 1.0 / float(gaps.mean())
        cv = float(gaps.std() / gaps.mean())
    return Demand(
        at=0.0,
        rate=found,
        rate_gradient=0.0,
        cv=cv,
        cv_by_window={},
        prompt_tokens=float(np.mean([arrival.num_prompt_tokens for arrival in arrivals])),
        output_tokens=float(np.mean([arrival.num_output_tokens for arrival in arrivals])),
        num_arrived=len(arrivals),
    )


def split_of(status: ServerStatus, profile: ModelProfile) -> Split:
    """The split that a server serves with, from its status; memory such that its KV capacity is the server's."""
    stages = status.stages
    boundaries = status.layout.boundaries
    num_kv_bytes = status.kv.max_tokens * profile.kv_bytes_per_token
    cuts = (0, *boundaries, profile.num_layers)
    devices = []
    for index, stage in enumerate(stages):
        start, stop = cuts[index], cuts[index + 1]
        devices.append(
            StageDevice(
                name=stage.name,
                node=stage.node,
                compute=f"{stage.node}/{stage.device}",
                domain=stage.name,
                memory_bytes=profile.stage_bytes(start, stop) + stage.overhead_bytes + num_kv_bytes * (stop - start),
                overhead_bytes=stage.overhead_bytes,
            )
        )
    return Split(boundaries=boundaries, devices=tuple(devices))


def mean_error(points: Sequence[Point], metric: str, *, in_hindsight: bool = False) -> float | None:
    """Mean of the absolute relative errors; None where no point has the metric, infinite where one is."""
    all_errors = [point.errors_in_hindsight if in_hindsight else point.errors for point in points]
    errors = [abs(errors[metric]) for errors in all_errors if metric in errors]
    return float(np.mean(errors)) if errors else None
