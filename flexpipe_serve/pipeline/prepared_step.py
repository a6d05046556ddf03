"""What of a step a stage can do before the hidden states come: checks, rotary factors, and the plan of the attention.

The Router sends a step to all stages at once, so a stage prepares it while those before compute.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from flexpipe_serve.pipeline.messages import StepBatch

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class PreparedStep:
    """A step that was checked."""

    batch: StepBatch
    num_blocks: int
    """Committed in the stage's segments when it was."""
    rotary: Any
    """Of the stage's model, for :func:`positions_of`; None where the step computes nothing."""
    plan: Any
    """Of the attention backend."""
    seconds: float
    """How long preparing it took."""


def positions_of(batch: StepBatch) -> Int64:
    """Place of each token of a step in its sequence."""
    if batch.header.num_tokens == batch.header.num_seqs:
        return batch.num_computed.astype(np.int64)
    firsts = batch.num_new.cumsum() - batch.num_new - batch.num_computed
    return np.arange(batch.header.num_tokens) - np.repeat(firsts, batch.num_new)
