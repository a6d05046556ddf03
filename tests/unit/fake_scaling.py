"""Pipelines that come and go in no time."""

from __future__ import annotations

from flexpipe_serve.engine.scale_record import PipelineState, ScaleRecord, ScaleRequest
from flexpipe_serve.errors import ConfigError
from flexpipe_serve.pipeline.layout import even_boundaries

NUM_LAYERS = 30


class FakeScaling:
    """The part of an engine that scales, from one pipeline of two stages.

    Attributes:
        refuse_scale_with: raised instead.
    """

    def __init__(self) -> None:
        super().__init__()
        self.refuse_scale_with: Exception | None = None
        self.scale_requests: list[ScaleRequest] = []
        self._boundaries: list[tuple[int, ...]] = [(15,)]

    async def scale(self, request: ScaleRequest) -> ScaleRecord:
        self.scale_requests.append(request)
        if self.refuse_scale_with is not None:
            raise self.refuse_scale_with
        before = list(self._boundaries)
        if request.layouts is None:
            self._boundaries = (before + before[:1] * request.num_pipelines)[: request.num_pipelines]
        else:
            self._boundaries = [
                even_boundaries(num_layers=NUM_LAYERS, num_stages=layout.stages)
                if layout.stages is not None
                else layout.boundaries or ()
                for layout in request.layouts
            ]
        for boundary in (b for boundaries in self._boundaries for b in boundaries):
            if boundary >= NUM_LAYERS:
                raise ConfigError(f"boundary {boundary} is beyond the model's {NUM_LAYERS} layers.")
        return ScaleRecord(
            reason=request.reason,
            num_before=len(before),
            pipelines=tuple(
                PipelineState(pipeline=number, boundaries=boundaries, num_blocks=4000 // len(self._boundaries))
                for number, boundaries in enumerate(self._boundaries)
            ),
            num_handed_over=3 * max(0, len(before) - len(self._boundaries)),
            seconds=1.25,
        )
