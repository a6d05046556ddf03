"""How long a request takes on a split, by how many are there: continuous batching, step by step. Pure code."""

from __future__ import annotations

import math
from bisect import bisect_left
from typing import NamedTuple

from flexpipe_serve.planner.profile import StepShape
from flexpipe_serve.planner.step_times import StepTimes
from flexpipe_serve.planner.types import Demand

_BATCHES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0)
"""Sequences present at which times are worked out, beside all places; between them times are linear."""
_PREEMPTIONS = 3.0
"""Of a sequence that is nearly all output and has the memory to itself; fitted to simulations of the scheduler, where 3
to 25 sequences fit."""


class Times(NamedTuple):
    """Of one request, with ``num_seqs`` present, itself included. Seconds."""

    num_seqs: float
    chunks_s: float
    """What its prompt holds up the pipeline."""
    prefill_s: float
    """From admission to the first token."""
    token_s: float
    residence_s: float
    """From admission to the last token."""


class RequestTimes:
    """Of requests with a demand's lengths, in one pipeline, when waiting is left out.

    Args:
        demand: its mean lengths and prefix hits count here.
        num_kv_tokens: room for KV.
    """

    num_places: float
    """Sequences that can be there at once; 0 where not even one request's KV fits."""
    batches: tuple[float, ...]
    """Numbers of sequences that ``at`` knows, rising; the last is all places."""

    def __init__(self, steps: StepTimes, demand: Demand, *, num_kv_tokens: int) -> None:
        self._steps = steps
        self._prompt_tokens = max(1.0, demand.prompt_tokens)
        self._num_decodes = max(1.0, demand.output_tokens) - 1  # the first token comes with the prompt's last chunk
        hit_tokens = self._prompt_tokens * min(1.0, demand.prefix_hit_share)
        # At least the last token of a prompt is computed.
        self._new_tokens = max(1.0, self._prompt_tokens - hit_tokens)
        self._num_pairs = (self._prompt_tokens**2 - hit_tokens**2) / 2
        self._token_budget = float(steps.limits.max_num_batched_tokens)
        self._num_chunks = max(1.0, self._new_tokens / self._token_budget)
        self.num_places = num_places(demand, num_kv_tokens, max_num_seqs=steps.limits.max_num_seqs)
        self.batches = (*(batch for batch in _BATCHES if batch < self.num_places), self.num_places)
        self._known: dict[int, Times] = {}

    def at(self, index: int) -> Times:
        """With ``batches[index]`` sequences present."""
        if index not in self._known:
            times = self._work_out(self.batches[index])
            if index == len(self.batches) - 1 and self.num_places < self._steps.limits.max_num_seqs:
                times = self._with_preemptions(times)
            self._known[index] = times
        return self._known[index]

    def with_seqs(self, num_seqs: float) -> Times:
        """With ``num_seqs`` present, up to all places."""
        index = bisect_left(self.batches, num_seqs)
        if index == 0:
            return self.at(0)
        before, after = self.at(index - 1), self.at(index)
        part = (num_seqs - before.num_seqs) / (after.num_seqs - before.num_seqs)
        return Times(*[a + part * (b - a) for a, b in zip(before, after, strict=True)])

    def mean_shape(self, num_seqs: float) -> StepShape:
        """The average step with so many sequences present."""
        return self._shape(*self._per_step(num_seqs / min(float(self._steps.depth), num_seqs)))

    def _work_out(self, num_seqs: float) -> Times:
        """Each sequence is in one of ``depth`` steps in flight: a round of them gives it a token, or a chunk."""
        depth = min(float(self._steps.depth), num_seqs)
        rows, chunks = self._per_step(num_seqs / depth)
        plain = plain_pass_s, plain_busiest_s = self._steps.at(self._shape(rows, 0.0))
        chunk = chunk_pass_s, chunk_busiest_s = self._steps.at(self._shape(rows, 1.0))
        plain_s = max(plain_busiest_s, plain_pass_s / depth)
        chunk_s = max(chunk_busiest_s, chunk_pass_s / depth)
        # A request's own chunks make its own prefill longer, not its tokens.
        chunks *= (num_seqs - 1) / num_seqs
        # What the token budget leaves out of a step comes in further ones.
        num_fitting = max(1.0, (self._token_budget - rows) * self._num_chunks / self._new_tokens)
        mean = min(chunks, num_fitting)
        most = max(mean, _most_chunks(chunks, num_fitting, depth))
        # The busiest compute has all steps of a round to do, and no round is shorter than its longest step's pass.
        _, busiest_s = self._with_chunks(rows, mean, plain, chunk)
        pass_s, _ = self._with_chunks(rows, most, plain, chunk)
        interval_s = max(busiest_s, pass_s / depth)
        token_s = depth * interval_s * max(1.0, chunks / num_fitting)
        prefill_s = self._num_chunks * (token_s + chunk_pass_s - plain_pass_s)
        return Times(
            num_seqs=num_seqs,
            chunks_s=self._num_chunks * (chunk_s - plain_s),
            prefill_s=prefill_s,
            token_s=token_s,
            residence_s=prefill_s + self._num_decodes * token_s,
        )

    def _with_preemptions(self, times: Times) -> Times:
        """Where memory is full: sequences are admitted by their prompts, grow, and now and then there is no room for
        all. Then one leaves and is computed again, and all wait for that. By so much more than fits as independent
        lengths vary, so the less the more sequences there are."""
        grown = self._num_decodes / (self._prompt_tokens + self._num_decodes)
        num_again = _PREEMPTIONS * grown / math.sqrt(times.num_seqs)
        num_tokens = self._prompt_tokens + self._num_decodes / 2
        _, busiest_s = self._steps.at(StepShape(num_tokens=num_tokens, num_samples=0.0, num_pairs=num_tokens**2 / 2))
        again_s = num_again * times.num_seqs * busiest_s
        return times._replace(
            token_s=times.token_s + again_s / max(1.0, self._num_decodes), residence_s=times.residence_s + again_s
        )

    def _with_chunks(
        self, rows: float, chunks: float, plain: tuple[float, float], chunk: tuple[float, float]
    ) -> tuple[float, float]:
        """As StepTimes.at, of a step with so many chunks on average, given that of one with none and with one."""
        if chunks > 1:
            return self._steps.at(self._shape(rows, chunks))
        return plain[0] + chunks * (chunk[0] - plain[0]), plain[1] + chunks * (chunk[1] - plain[1])

    def _per_step(self, num_seqs: float) -> tuple[float, float]:
        """Of so many sequences in a step, how many decode and how many are in their prompt."""
        decoding = self._num_decodes / (self._num_decodes + self._num_chunks)
        return num_seqs * decoding, num_seqs * (1 - decoding)

    def _shape(self, rows: float, chunks: float) -> StepShape:
        """``rows`` decoding sequences, half through their output on average, and ``chunks`` chunks."""
        num_prompts = chunks / self._num_chunks
        return StepShape(
            num_tokens=rows + num_prompts * self._new_tokens,
            num_samples=rows + num_prompts,
            num_context_tokens=rows * (self._prompt_tokens + self._num_decodes / 2),
            num_pairs=num_prompts * self._num_pairs,
        )


def num_places(demand: Demand, num_kv_tokens: int, *, max_num_seqs: int) -> float:
    """Sequences that can be there at once; 0 where not even one fits. One of them is at its end, the others half
    through their output on average."""
    prompt_tokens, output_tokens = max(1.0, demand.prompt_tokens), max(1.0, demand.output_tokens)
    if num_kv_tokens < prompt_tokens + output_tokens:
        return 0.0
    num_others = (num_kv_tokens - prompt_tokens - output_tokens) / (prompt_tokens + output_tokens / 2)
    return min(float(max_num_seqs), 1 + num_others)


def _most_chunks(chunks: float, num_fitting: float, depth: float) -> float:
    """Chunks in that one of ``depth`` steps in flight that has most, if ``chunks`` is the mean and at most
    ``num_fitting`` go into a step. Where stages are equal it sets the pace: while it is in one, the others are soon
    idle.

    Where only one fits, each step has one or none; where many do, their number is as good as Poisson.
    """
    if depth == 1:
        return min(chunks, num_fitting)
    one_or_none = 1 - math.pow(1 - min(1.0, chunks), depth)
    chance = at_most = math.exp(-chunks)
    poisson, j = 0.0, 0
    while j < num_fitting and at_most < 1 - 1e-6:
        poisson += (1 - math.pow(at_most, depth)) * min(1.0, num_fitting - j)
        j += 1
        chance *= chunks / j
        at_most += chance
    return poisson + (one_or_none - poisson) / num_fitting
