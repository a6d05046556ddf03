"""When nodes are given back (F31): a change that needs fewer of them waits until nothing has needed them for a while.
Pure code."""

from __future__ import annotations

import msgspec

from flexpipe_serve.placement.elastic import FLOOR_SHARE, WINDOW_S, ElasticDevices
from flexpipe_serve.planner.types import Decision, Split, Verdict


class GiveBack:
    """Looks at every decision before it is carried out. On one node nothing is ever given back, and nothing waits.

    A node is needed as long as the best candidate has stages there, moved to or not. Of several pipelines it sees those
    whose devices the splits name.

    Args:
        window_s: a node is given back when nothing has needed it for so long.
        floor_share: of the most nodes needed at once within a day that is always kept.
    """

    def __init__(self, *, window_s: float = WINDOW_S, floor_share: float = FLOOR_SHARE) -> None:
        self._window_s = window_s
        self._floor_share = floor_share
        self._elastic = ElasticDevices(window_s=window_s, floor_share=floor_share)

    def judge(self, decision: Decision, *, at: float) -> Decision:
        """The decision itself, or to stay with the reason, where it would give a node back too early.

        Args:
            at: now, in seconds on a clock that does not fall.
        """
        held = _nodes(decision.current.split)
        needed = _nodes(_best(decision))
        expired = self._elastic.update(at, held=held, in_use=needed)
        if decision.verdict is Verdict.STAY or len(needed) >= len(held) or not (held - needed).difference(expired):
            return decision
        sentence = (
            f"{decision.sentence} But it waits: that takes {len(held)} nodes down to {len(needed)}, and a node is given"
            f" back when nothing has needed it for {self._window_s:g} s, except the last {self._elastic.floor}"
            f" ({self._floor_share:.0%} of the {self._elastic.peak} needed at once within a day)."
        )
        return msgspec.structs.replace(decision, verdict=Verdict.STAY, chosen=None, hurry=False, sentence=sentence)


def _best(decision: Decision) -> Split:
    if decision.chosen is not None:
        return decision.chosen
    best = next(iter(decision.candidates), decision.current)
    return decision.current.split if best.refused else best.split


def _nodes(split: Split) -> set[str]:
    return {device.node for device in split.devices}
