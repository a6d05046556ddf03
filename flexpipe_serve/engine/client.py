"""The seam between HTTP and the engine: what the ingress needs, and nothing more.

``engine/engine.py`` implements it over a pipeline; tests of the HTTP layer use a fake.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import tokenizers

from flexpipe_serve.engine.outputs import SequenceOutput
from flexpipe_serve.engine.sampling_params import SamplingParams
from flexpipe_serve.engine.scale_record import ScaleRecord, ScaleRequest
from flexpipe_serve.engine.status import Event, ServerStatus
from flexpipe_serve.placement.drain import DrainRecord, DrainRequest
from flexpipe_serve.planner.types import Decision
from flexpipe_serve.refactor.record import RefactorRecord, RefactorRequest


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """Static facts of the served model, known before any stage is up."""

    name: str
    created: int
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]


class Tokenizer(Protocol):
    """The part of a tokenizer that the ingress uses."""

    @property
    def backend(self) -> tokenizers.Tokenizer:
        """For single tokens' bytes, which log probabilities carry."""
        ...

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...

    def decode(self, token_ids: Sequence[int]) -> str: ...

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], **kwargs: Any) -> list[int]:
        """Token ids of the rendered conversation. Raises InvalidRequestError where the template refuses it."""
        ...


class EngineClient(Protocol):
    """An engine that generates."""

    @property
    def model(self) -> ModelCard: ...

    @property
    def tokenizer(self) -> Tokenizer: ...

    def generate(
        self,
        *,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        n: int = 1,
        priority: int = 0,
    ) -> AsyncIterator[SequenceOutput]:
        """Outputs of all ``n`` sequences, as they come, until each has a finish reason.

        Closing the iterator (or cancelling its task) aborts what still runs, exactly once.
        Lower ``priority`` values are served first. Sequence ``i`` samples with ``params.seed + i``.

        Raises (before the first output):
            InvalidRequestError: the prompt does not fit.
            QueueFullError: the waiting queue is at its limit.
            EngineUnavailableError: the pipeline is not up.
        """
        ...

    def status(self) -> ServerStatus:
        """What ``GET /flexpipe/status`` answers."""
        ...

    async def check_health(self) -> None:
        """Raises EngineUnavailableError unless a request could be served now."""
        ...

    async def refactor(self, request: RefactorRequest) -> RefactorRecord:
        """Start a refactoring, or with ``dry_run`` only plan it. Returns once it is planned and started.

        A dry run's record is over, in phase PLAN: DONE where it would be done, REFUSED where not.

        Raises:
            ConfigError: the model cannot be cut like that.
            RefactorRefusedError: it cannot be done; nothing was touched.
            RefactorBusyError: another one is running.
            EngineUnavailableError: the pipeline is not up.
        """
        ...

    def refactoring(self, refactoring_id: str, /) -> RefactorRecord | None:
        """Its record as of now; None where there is none, or no longer."""
        ...

    def cancel_refactoring(self, refactoring_id: str, /) -> RefactorRecord | None:
        """Ask it to stop, which its record tells when it has; without effect after the switch, or when it is over."""
        ...

    def refactorings(self) -> list[RefactorRecord]:
        """Records of the latest ones, the newest last."""
        ...

    async def scale(self, request: ScaleRequest) -> ScaleRecord:
        """Let pipelines come and go. Returns when they have.

        Raises:
            ConfigError: the model cannot be cut like that.
            RefactorRefusedError: there is no room; what serves was not touched.
            RefactorBusyError: pipelines come or go already, or a refactoring runs.
            EngineUnavailableError: the pipeline is not up, or a new one could not be started.
        """
        ...

    async def drain(self, request: DrainRequest) -> DrainRecord:
        """Begin to empty a node, or give the one that is being emptied a new deadline. Returns at once.

        Raises:
            InvalidRequestError: there is no such node.
            RefactorRefusedError: there is no other node.
            EngineUnavailableError: the pipeline is not up.
        """
        ...

    def drains(self) -> list[DrainRecord]:
        """Records of the nodes that are being emptied or kept empty."""
        ...

    async def undrain(self, node: str, /) -> DrainRecord | None:
        """Let stages be launched on a node again. Returns its last record; None where it was not drained.

        Raises:
            RefactorRefusedError: Ray itself drains it.
        """
        ...

    def events(self) -> list[Event]:
        """What happened lately, the newest last."""
        ...

    def metrics_text(self) -> str:
        """The body of ``GET /metrics``, for Prometheus. Not for the event loop's thread."""
        ...

    def plan(self) -> Decision:
        """What the planner would do now; nothing comes of it. Not for the event loop's thread.

        Raises:
            EngineUnavailableError: there is no pipeline, or no profile to plan by yet.
        """
        ...

    def decisions(self) -> list[Decision]:
        """The planner's latest decisions, the newest last."""
        ...
