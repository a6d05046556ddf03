"""FlexPipe's Eq 12: whether stages that have yet to start can serve what is due in time."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec


class PipelineStart(msgspec.Struct, frozen=True, kw_only=True):
    """A pipeline that is to be brought up."""

    setup_s: float
    """Until it serves (S)."""
    rate: float
    """Requests a second from then on (mu): its slowest stage's."""


def num_servable(starts: Iterable[PipelineStart], *, seconds: float) -> float:
    """Requests that the pipelines can serve within ``seconds``: ``sum_k (T - S_k) mu_k``, to be held against ``r``.

    Eq 12 divides by the queue's length, which leaves its units open, and sums over the stages; but every request
    passes all stages of a pipeline, so the sum goes over pipelines.
    """
    return sum(max(0.0, seconds - start.setup_s) * start.rate for start in starts)
