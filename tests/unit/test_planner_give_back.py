"""A change to fewer nodes waits (F31), any other does not."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from flexpipe_serve.planner.give_back import GiveBack
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

DEMAND = Demand(at=0, rate=1, rate_gradient=0, cv=1, cv_by_window={}, prompt_tokens=1, output_tokens=1)
PREDICTION = Prediction(ttft_s=1, tpot_s=1, latency_s=1, max_rate=1, utilisation=0.5, num_kv_tokens=1)


def split(nodes: str) -> Split:
    devices = tuple(
        StageDevice(name=f"{n}/{i}", node=n, compute=n, domain=n, memory_bytes=1) for i, n in enumerate(nodes)
    )
    return Split(boundaries=tuple(range(1, len(nodes))), devices=devices)


def decision(current: str, best: str, *, moves: bool = True) -> Decision:
    scores = [CandidateScore(split=split(nodes), prediction=PREDICTION, score=1.0) for nodes in (best, current)]
    return Decision(
        at=0,
        policy="any",
        trigger=Trigger.INTERVAL,
        demand=DEMAND,
        current=scores[1],
        candidates=tuple(scores),
        verdict=Verdict.MOVE if moves else Verdict.STAY,
        chosen=scores[0].split if moves else None,
        sentence="So it is.",
    )


def test_a_node_is_given_back_when_nothing_has_needed_it_for_the_window() -> None:
    give_back = GiveBack(window_s=300, floor_share=0.3)
    shrinks = decision("ab", "a")
    waits = give_back.judge(shrinks, at=0)
    assert (waits.verdict, waits.chosen) == (Verdict.STAY, None)
    assert waits.sentence.startswith("So it is. But it waits: that takes 2 nodes down to 1")
    assert "300 s" in waits.sentence
    # Between the policy's own waits, for agreement or after a change, the node is as idle as before.
    stays = decision("ab", "a", moves=False)
    assert give_back.judge(stays, at=299) is stays
    assert give_back.judge(shrinks, at=299.9).verdict is Verdict.STAY
    assert give_back.judge(shrinks, at=300) is shrinks


def test_a_need_in_between_begins_the_window_anew() -> None:
    give_back = GiveBack(window_s=300)
    give_back.judge(decision("ab", "a"), at=0)
    give_back.judge(decision("ab", "ab", moves=False), at=200)
    assert give_back.judge(decision("ab", "a"), at=300).verdict is Verdict.STAY
    assert give_back.judge(decision("ab", "a"), at=600).verdict is Verdict.MOVE


def test_the_floor_is_kept_however_long_it_is_idle() -> None:
    give_back = GiveBack(window_s=10, floor_share=0.5)
    give_back.judge(decision("abcd", "abcd", moves=False), at=0)
    for at in range(0, 100, 5):
        answer = give_back.judge(decision("abcd", "a"), at=at)
        assert answer.verdict is Verdict.STAY
    assert "the last 2 (50% of the 4 needed" in answer.sentence
    assert give_back.judge(decision("abcd", "ab"), at=100).verdict is Verdict.MOVE
    day = 86_400 + 101
    give_back.judge(decision("abcd", "a"), at=day)
    assert give_back.judge(decision("abcd", "a"), at=day + 10).verdict is Verdict.MOVE, "the peak is too long ago"


def test_what_is_refused_is_no_sign_of_idleness() -> None:
    give_back = GiveBack(window_s=10)
    refused = decision("ab", "a", moves=False)
    best = msgspec.structs.replace(refused.candidates[0], refused="no room")
    refused = msgspec.structs.replace(refused, candidates=(best, refused.candidates[1]))
    give_back.judge(refused, at=0)
    assert give_back.judge(decision("ab", "a"), at=20).verdict is Verdict.STAY


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(1, 3), st.integers(1, 3)), max_size=20))
def test_on_one_node_and_to_as_many_nodes_nothing_waits(looks: Sequence[tuple[str, int, int]]) -> None:
    give_back = GiveBack()
    for at, (node, num_before, num_after) in enumerate(looks):
        asked = decision(node * num_before, node * num_after)
        assert give_back.judge(asked, at=at) is asked
        swaps = decision("ab", "bc")
        assert give_back.judge(swaps, at=at) is swaps
