"""A planner that would merge two stages."""

from __future__ import annotations

from flexpipe_serve.planner.types import (
    CandidateScore,
    Decision,
    Demand,
    Prediction,
    Split,
    StageDevice,
    Trigger,
    Verdict,
)

_DEVICE = StageDevice(name="node", node="node", compute="node", domain="node", memory_bytes=2**30)
_PREDICTION = Prediction(ttft_s=0.1, tpot_s=0.02, latency_s=2.0, max_rate=3.0, utilisation=0.5, num_kv_tokens=4096)
ONE, TWO = Split(boundaries=(), devices=(_DEVICE,)), Split(boundaries=(15,), devices=(_DEVICE, _DEVICE))


class FakePlanner:
    """The planner's part of an engine client."""

    def plan(self) -> Decision:
        current = CandidateScore(split=TWO, prediction=_PREDICTION, score=0.0)
        best = CandidateScore(split=ONE, prediction=_PREDICTION, score=3.0, gain_s=4.0, cost_s=1.0)
        return Decision(
            at=1_700_000_000.0,
            policy="gated",
            trigger=Trigger.ASKED,
            demand=Demand(
                at=5.0,
                rate=1.5,
                rate_gradient=0.0,
                cv=1.0,
                cv_by_window={"15s": 1.0},
                prompt_tokens=128.0,
                output_tokens=64.0,
            ),
            current=current,
            candidates=(best, current),
            verdict=Verdict.MOVE,
            chosen=ONE,
            sentence="Move from 2 stages (cut at 15): 1 stage has no hops.",
        )

    def decisions(self) -> list[Decision]:
        return [self.plan()]
