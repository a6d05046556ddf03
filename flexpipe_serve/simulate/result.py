"""What came of a simulation."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

from flexpipe_serve.planner.types import Decision, Demand, Split


class SimulatedRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One request that was served; times in virtual seconds."""

    arrived_at: float
    first_token_at: float
    finished_at: float
    num_prompt_tokens: int
    num_output_tokens: int

    @property
    def latency_s(self) -> float:
        return self.finished_at - self.arrived_at

    @property
    def ttft_s(self) -> float:
        return self.first_token_at - self.arrived_at

    @property
    def tpot_s(self) -> float | None:
        """Seconds a token after the first; None for a single token."""
        num_gaps = self.num_output_tokens - 1
        return (self.finished_at - self.first_token_at) / num_gaps if num_gaps else None


class SimulatedChange(msgspec.Struct, frozen=True, kw_only=True):
    """A refactoring."""

    asked_at: float
    switched_at: float | None
    """None where it was refused, or the simulation ended before."""
    old: Split
    new: Split
    refused: str | None = None


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """What held at one of the planner's intervals."""

    demand: Demand
    num_stages: int
    num_pipelines: int
    kv_use: float
    """Share of the KV blocks that sequences use."""
    utilisation: float
    """Of the present split, as the policy predicts it."""


class SimulationResult(msgspec.Struct, frozen=True, kw_only=True):
    """One simulation: all figures are simulated, none was measured on a server."""

    requests: tuple[SimulatedRequest, ...]
    """In order of arrival."""
    num_rejected: int
    """Too long for the KV cache."""
    changes: tuple[SimulatedChange, ...]
    decisions: tuple[Decision, ...]
    """Those to move."""
    num_decisions: int
    samples: tuple[Sample, ...]
    duration_s: float
    """Virtual, to the end of the last request."""
    device_seconds: float
    """Devices held, over time."""
    num_steps: int
    num_preemptions: int


class Spread(msgspec.Struct, frozen=True, kw_only=True):
    """Of some times, seconds."""

    mean: float
    p50: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        return cls(
            mean=float(np.mean(values)), p50=float(np.percentile(values, 50)), p99=float(np.percentile(values, 99))
        )


class SimulationSummary(msgspec.Struct, frozen=True, kw_only=True):
    """The figures of a result."""

    num_requests: int
    num_rejected: int
    duration_s: float
    latency: Spread
    ttft: Spread
    tpot: Spread | None
    tokens_per_s: float
    num_changes: int
    num_decisions: int
    device_seconds: float


def summarize(result: SimulationResult) -> SimulationSummary | None:
    """None where no request was served."""
    if not result.requests:
        return None
    tpots = [tpot for request in result.requests if (tpot := request.tpot_s) is not None]
    return SimulationSummary(
        num_requests=len(result.requests),
        num_rejected=result.num_rejected,
        duration_s=result.duration_s,
        latency=Spread.of([request.latency_s for request in result.requests]),
        ttft=Spread.of([request.ttft_s for request in result.requests]),
        tpot=Spread.of(tpots) if tpots else None,
        tokens_per_s=sum(request.num_output_tokens for request in result.requests) / result.duration_s,
        num_changes=sum(change.switched_at is not None for change in result.changes),
        num_decisions=result.num_decisions,
        device_seconds=result.device_seconds,
    )
