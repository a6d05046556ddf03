"""An engine without a model: deterministic replies, controllable pace, and a record of what was asked and aborted."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from fake_drains import FakeDrains
from fake_planner import FakePlanner
from fake_refactorings import FakeRefactorings
from fake_scaling import FakeScaling
from status_samples import pipeline_status, server_status
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from flexpipe_serve.engine.client import ModelCard
from flexpipe_serve.engine.detokenizer import IncrementalDetokenizer
from flexpipe_serve.engine.outputs import FinishReason, SequenceOutput, TokenLogprob
from flexpipe_serve.engine.sampling_params import SamplingParams
from flexpipe_serve.engine.status import ServerStatus
from flexpipe_serve.errors import EngineUnavailableError, InvalidRequestError, QueueFullError

REPLY = "Paris, naïve café 😀. "
VOCAB_SIZE = 264


class FakeTokenizer:
    """One token a byte, three special ones, and a few ids that the model has and the tokenizer has not."""

    def __init__(self) -> None:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        self.backend = Backend(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
        self.backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        self.backend.decoder = decoders.ByteLevel()
        self.backend.add_special_tokens([AddedToken(t, special=True) for t in ("<|eos|>", "<|turn|>", "<|bos|>")])
        self.eos = self.backend.token_to_id("<|eos|>")

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, token_ids: Sequence[int]) -> str:
        return self.backend.decode(list(token_ids))

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], **kwargs: Any) -> list[int]:
        if any(message["role"] == "system" for message in messages[1:]):
            raise InvalidRequestError("The template allows a system message only at the beginning.", param="messages")
        text = "".join(f"<|turn|>{m['role']}\n{m['content']}" for m in messages)
        return self.encode(text + "<|turn|>assistant\n" if kwargs.get("add_generation_prompt") else text)


class FakeEngine(FakeRefactorings, FakeDrains, FakeScaling, FakePlanner):
    """Replies ``reply``, token by token; a sampled sequence begins ``seed + index`` tokens later in it.

    Args:
        reply: what every sequence says, then end-of-sequence; over and over with ``ignore_eos``.
        gate: each token waits for one permit of it; None: no waiting.
        token_delay_s: seconds a token takes.
        refuse_with: raised instead of generating.
        crash_after: raise RuntimeError after this many tokens of a sequence.
        error_after: end with ``finish_reason`` "error" after this many tokens.
        max_running: more sequences at once are refused as QueueFullError.
    """

    def __init__(
        self,
        *,
        reply: str = REPLY,
        gate: asyncio.Semaphore | None = None,
        token_delay_s: float = 0.0,
        refuse_with: Exception | None = None,
        crash_after: int | None = None,
        error_after: int | None = None,
        max_running: int | None = None,
        max_model_len: int = 512,
    ) -> None:
        super().__init__()
        self.tokenizer = FakeTokenizer()
        self.model = ModelCard(
            name="fake/model",
            created=1_700_000_000,
            max_model_len=max_model_len,
            vocab_size=VOCAB_SIZE,
            eos_token_ids=(self.tokenizer.eos,),
        )
        self.gate = gate
        self.token_delay_s = token_delay_s
        self.refuse_with = refuse_with
        self.crash_after = crash_after
        self.error_after = error_after
        self.max_running = max_running
        self.healthy = True
        self.started: list[str] = []
        self.params: list[SamplingParams] = []
        self.priorities: list[int] = []
        self.finished: list[str] = []
        self.aborted: list[str] = []
        self.has_aborted = threading.Event()
        """Set at each abort; a thread other than the engine's may wait for it."""
        self.num_held = 0
        """Requests that wait at the gate."""
        self._num_running = 0
        self._held = asyncio.Condition()
        self._reply_ids = self.tokenizer.encode(reply)

    def status(self) -> ServerStatus:
        return server_status(pipeline_status(queue={"num_running": self._num_running}))

    def metrics_text(self) -> str:
        return f"# TYPE running gauge\nrunning {self._num_running}\n"

    async def check_health(self) -> None:
        if not self.healthy:
            raise EngineUnavailableError("The pipeline is starting.")

    async def generate(
        self,
        *,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        n: int = 1,
        priority: int = 0,
    ) -> AsyncIterator[SequenceOutput]:
        if self.refuse_with is not None:
            raise self.refuse_with
        if self.max_running is not None and self._num_running + n > self.max_running:
            raise QueueFullError(f"{self._num_running} sequences run; at most {self.max_running}.", retry_after_s=7)
        assert request_id not in self.started, "request ids must be unique"
        assert prompt_token_ids
        assert all(0 <= i < VOCAB_SIZE for i in prompt_token_ids)
        assert len(prompt_token_ids) + params.max_tokens <= self.model.max_model_len
        self.started.append(request_id)
        self.params.append(params)
        self.priorities.append(priority)
        self._num_running += n
        sequences = [_Sequence(self, i, prompt_token_ids, params) for i in range(n)]
        try:
            while live := [s for s in sequences if not s.finished]:
                for sequence in live:
                    await self._pace()
                    yield sequence.step()
            self.finished.append(request_id)
        finally:
            self._num_running -= n
            if request_id not in self.finished:
                self.aborted.append(request_id)
                self.has_aborted.set()

    async def holds(self, num_requests: int) -> None:
        """Returns when this many requests have come to wait at the gate."""
        async with self._held:
            await self._held.wait_for(lambda: self.num_held >= num_requests)

    async def _pace(self) -> None:
        if self.gate is not None:
            if self.gate.locked():
                async with self._held:
                    self.num_held += 1
                    self._held.notify_all()
            await self.gate.acquire()
        await asyncio.sleep(self.token_delay_s)

    def token_at(self, position: int, start: int, *, ignore_eos: bool) -> int:
        if position == len(self._reply_ids) and not ignore_eos:
            return self.tokenizer.eos
        return self._reply_ids[(start + position) % len(self._reply_ids)]


class _Sequence:
    def __init__(self, engine: FakeEngine, index: int, prompt: Sequence[int], params: SamplingParams) -> None:
        self.finished = False
        self._engine = engine
        self._index = index
        self._prompt = prompt
        self._params = params
        self._start = 0 if params.greedy else params.seed + index
        self._num_tokens = 0
        self._detokenizer = IncrementalDetokenizer(
            engine.tokenizer.backend,
            prompt_token_ids=prompt,
            stop=params.stop,
            include_stop_str_in_output=params.include_stop_str_in_output,
        )

    def step(self) -> SequenceOutput:
        if self._engine.crash_after == self._num_tokens:
            raise RuntimeError("the fake engine crashed")
        if self._engine.error_after == self._num_tokens:
            self.finished = True
            return SequenceOutput(index=self._index, finish_reason="error", error="A stage was lost.")
        if self._params.max_tokens == 0:
            return self._output((), "", "length", None)
        token = self._engine.token_at(self._num_tokens, self._start, ignore_eos=self._params.ignore_eos)
        text, stop_string = self._detokenizer.push(token)
        reason: FinishReason | None = None
        stop: str | int | None = stop_string
        if stop_string is not None or (token == self._engine.tokenizer.eos and not self._params.ignore_eos):
            reason = "stop"
        elif token in self._params.stop_token_ids:
            reason, stop = "stop", token
        elif self._num_tokens + 1 == self._params.max_tokens:
            reason = "length"
        if reason is not None and stop_string is None:
            text += self._detokenizer.flush()
        return self._output((token,), text, reason, stop)

    def _output(
        self, tokens: tuple[int, ...], text: str, reason: FinishReason | None, stop: str | int | None
    ) -> SequenceOutput:
        first = self._num_tokens == 0
        self._num_tokens += len(tokens)
        self.finished = reason is not None
        k = self._params.num_logprobs
        prompt_logprobs = None
        if first and self._params.prompt_logprobs:
            rest = tuple(fake_logprob(i, k or 0) for i in self._prompt[1:])
            prompt_logprobs = (TokenLogprob(self._prompt[0], None), *rest)
        return SequenceOutput(
            index=self._index,
            token_ids=tokens,
            text=text,
            logprobs=() if k is None else tuple(fake_logprob(i, k) for i in tokens),
            prompt_logprobs=prompt_logprobs,
            finish_reason=reason,
            stop_reason=stop,
            num_cached_tokens=len(self._prompt) // 16 * 16 if first else 0,
        )


def fake_logprob(token_id: int, k: int) -> TokenLogprob:
    """The chosen token is the second most likely one; the least likely has no probability at all."""
    others = [(token_id + 1 + j) % 256 for j in range(k)]
    top = [(i, -0.5 * (j + 1)) for j, i in enumerate(others)]
    if k >= 2:
        top[1] = (token_id, -1.0)
    if k >= 3:
        top[-1] = (top[-1][0], float("-inf"))
    return TokenLogprob(token_id, -1.0, tuple(top))
