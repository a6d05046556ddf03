"""What a model costs on a device: measured times of its parts, and their sizes (F1).

Measured by :mod:`flexpipe_serve.model.profiling`; everything that predicts a time goes through :class:`ModelProfile`.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import Annotated

import msgspec

_Positive = Annotated[float, msgspec.Meta(gt=0)]
_NotNegative = Annotated[float, msgspec.Meta(ge=0)]


class Curve(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds, or a factor of them, by a count: linear between the measured points, beyond the last by the last slope,
    level before the first."""

    counts: tuple[float, ...]
    """Rising; at least one."""
    seconds: tuple[float, ...]

    def at(self, count: float) -> float:
        """Seconds for ``count``."""
        counts, seconds = self.counts, self.seconds
        if count <= counts[0] or len(counts) == 1:
            return seconds[0]
        right = bisect_right(counts, count)
        if right == len(counts):
            right -= 1
        before, since = counts[right - 1], seconds[right - 1]
        return since + (seconds[right] - since) / (counts[right] - before) * (count - before)


AS_MEASURED = Curve(counts=(1.0,), seconds=(1.0,))
"""A factor that changes nothing."""


class StepShape(msgspec.Struct, frozen=True, kw_only=True):
    """What one step computes, as far as its time depends on it."""

    num_tokens: float
    """New tokens of all sequences: a chunk's length for one that is in its prompt, 1 for one that decodes."""
    num_samples: float
    """Sequences that get a token."""
    num_context_tokens: float = 0.0
    """Cached tokens that decoding sequences read, summed over them."""
    num_pairs: float = 0.0
    """(new token, token it attends to) of the prompts' chunks, summed over them."""


class ModelProfile(msgspec.Struct, frozen=True, kw_only=True):
    """Times on one device when one stage has it alone, and sizes in bytes. Layers may differ by a factor."""

    model: str
    dtype: str
    device: str
    """The kind of device, such as a CPU's or GPU's name."""
    num_threads: int
    versions: dict[str, str]
    """Of what the times depend on: torch, our kernels, ..."""
    layer: Curve
    """Seconds of one layer by new tokens of the step, attention's reading of the cache left out."""
    layer_scale: tuple[float, ...]
    """Each layer's time in units of ``layer``; as many as layers."""
    context_token_s: _NotNegative
    """One layer: one cached token read for a decoding sequence."""
    pair_s: _NotNegative
    """One layer: one pair of a prompt's chunk."""
    embedding: Curve
    """By new tokens."""
    head: Curve
    """Final norm, LM head and sampling, by sequences that get a token."""
    stage_s: _NotNegative
    """Fixed cost of a step in each stage, beside its layers."""
    hop_s: _NotNegative
    """A step's message from the Router or a stage to the next, until work on it begins."""
    step_s: _NotNegative
    """The Router's own part of a step: scheduling, and taking the result, with its message from the last stage."""
    layer_bytes: tuple[int, ...]
    embedding_bytes: int
    head_bytes: int
    kv_bytes_per_token: int
    """In one layer."""
    activation_bytes_per_token: int
    """Between two stages."""
    load_bytes_per_s: _Positive
    """Weights read and packed by one thread with a core of its own; from the system's page cache, where they are once
    a stage has read them."""
    cached_load_bytes_per_s: float | None = None
    """The same from the host cache; None: not measured."""
    num_measured: int = 0
    """Steps that were measured and not fitted, to tell the error."""
    error_mean: float = 0.0
    """Relative error of the fit on those, mean of absolutes."""
    error_max: float = 0.0
    others_share: float = 0.0
    """Of the machine's cores, what other work took while it was measured: with much of it the times are too long."""
    compute_factor: Curve = AS_MEASURED
    """By which live steps take longer than all of a stage's times here, by new tokens of the step; see
    :mod:`flexpipe_serve.planner.calibration`."""
    message_factor: Curve = AS_MEASURED
    """The same of ``hop_s`` and ``step_s``, by sequences that get a token."""

    @property
    def num_layers(self) -> int:
        return len(self.layer_scale)

    def layer_seconds(self, shape: StepShape) -> float:
        """One layer of scale 1, as measured."""
        attention = self.context_token_s * shape.num_context_tokens + self.pair_s * shape.num_pairs
        return self.layer.at(shape.num_tokens) + attention

    def stage_seconds(self, start: int, stop: int, shape: StepShape, *, speed: float = 1.0) -> float:
        """A stage's computing in one step: layers ``start`` to ``stop``, with the embedding where it is the first, and
        head and sampling where it is the last.

        Args:
            speed: of the stage's device, in units of the profiled one.
        """
        seconds = self.stage_s + self.layer_seconds(shape) * sum(self.layer_scale[start:stop])
        if start == 0:
            seconds += self.embedding.at(shape.num_tokens)
        if stop == self.num_layers:
            seconds += self.head.at(shape.num_samples)
        return seconds * self.compute_factor.at(shape.num_tokens) / speed

    def stage_bytes(self, start: int, stop: int) -> int:
        """Weights of a stage."""
        num_bytes = sum(self.layer_bytes[start:stop])
        if start == 0:
            num_bytes += self.embedding_bytes
        if stop == self.num_layers:
            num_bytes += self.head_bytes
        return num_bytes
