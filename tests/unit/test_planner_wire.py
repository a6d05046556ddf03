"""Decisions survive JSON, infinite times included."""

from __future__ import annotations

import json
import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

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
from flexpipe_serve.planner.wire import from_wire, to_wire

times = st.one_of(st.floats(0, 1e6), st.just(math.inf))
names = st.text("abc-0", min_size=1, max_size=6)
devices = st.builds(
    StageDevice,
    name=names,
    node=names,
    compute=names,
    domain=names,
    memory_bytes=st.integers(1, 2**40),
    speed=st.floats(0.1, 4),
)
splits = st.integers(1, 4).flatmap(
    lambda n: st.builds(
        Split,
        boundaries=st.just(tuple(range(1, n))),
        devices=st.tuples(*[devices] * n),
        num_pipelines=st.integers(1, 3),
    )
)
predictions = st.builds(
    Prediction,
    ttft_s=times,
    tpot_s=times,
    latency_s=times,
    max_rate=st.floats(0, 1e3),
    utilisation=times,
    num_kv_tokens=st.integers(0, 10**6),
)
scores = st.builds(
    CandidateScore,
    split=splits,
    prediction=predictions,
    score=st.floats(-1e3, 1e3),
    refused=st.none() | st.just("no room"),
)
demands = st.builds(
    Demand,
    at=st.floats(0, 1e6),
    rate=st.floats(0, 100),
    rate_gradient=st.floats(-1, 1),
    cv=st.floats(0, 9),
    cv_by_window=st.dictionaries(names, st.floats(0, 9), max_size=2),
    prompt_tokens=st.floats(1, 1e4),
    output_tokens=st.floats(1, 1e4),
)
decisions = st.builds(
    Decision,
    at=st.floats(0, 1e9),
    policy=st.just("gated"),
    trigger=st.sampled_from(Trigger),
    demand=demands,
    current=scores,
    candidates=st.lists(scores, max_size=3).map(tuple),
    verdict=st.sampled_from(Verdict),
    chosen=st.none() | splits,
    sentence=st.text(max_size=20),
)


@given(decisions)
def test_json_and_back(decision: Decision) -> None:
    text = json.dumps(to_wire(decision), allow_nan=False)
    assert from_wire(json.loads(text)) == decision


def test_what_is_none_is_refused() -> None:
    with pytest.raises(msgspec.ValidationError):
        from_wire({"verdict": "stay"})
