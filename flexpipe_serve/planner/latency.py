"""What a split would do under a demand: batch, waiting, times, capacity. Pure code, in closed forms.

Continuous batching: a pipeline computes for up to ``MAX_NUM_SEQS`` sequences at once, fewer where KV lacks
room, and a step takes the longer the more there are. So the number present and the time each stays determine each
other (Little's law); beyond the last place they queue (Allen-Cunneen).
"""

from __future__ import annotations

import math
from bisect import bisect_left
from typing import NamedTuple

from flexpipe_serve.planner.profile import ModelProfile, StepShape
from flexpipe_serve.planner.step_times import StepTimes
from flexpipe_serve.planner.types import Demand, Prediction, Split

MAX_NUM_SEQS = 64
"""The scheduler's ``max_num_seqs``."""
TOKEN_BUDGET = 512
"""The scheduler's ``max_num_batched_tokens``."""
_BATCHES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, float(MAX_NUM_SEQS))
"""Sequences present at which times are worked out; between them they are linear."""


class _Times(NamedTuple):
    """Of one request, with ``num_seqs`` present, itself included."""

    num_seqs: float
    chunk_s: float
    """What its prompt holds up the pipeline."""
    prefill_s: float
    token_s: float
    residence_s: float
    """From admission to the last token."""


class SplitModel:
    """A split under requests of a demand's lengths, at whatever rate.

    Args:
        steps: of the split.
        demand: whose mean lengths and prefix hits count here.
        max_kv_tokens: upper limit of the KV beside memory's.
    """

    def __init__(self, steps: StepTimes, demand: Demand, *, max_kv_tokens: int | None = None) -> None:
        self.steps = steps
        self._num_pipelines = steps.split.num_pipelines
        self._prompt_tokens = max(1.0, demand.prompt_tokens)
        self._output_tokens = max(1.0, demand.output_tokens)
        self._hit_tokens = self._prompt_tokens * min(1.0, demand.prefix_hit_share)
        self.num_kv_tokens = steps.num_kv_tokens
        if max_kv_tokens is not None:
            self.num_kv_tokens = min(self.num_kv_tokens, max_kv_tokens)
        # At least the last token of a prompt is computed.
        self._new_tokens = max(1.0, self._prompt_tokens - self._hit_tokens)
        self._num_chunks = max(1.0, self._new_tokens / TOKEN_BUDGET)
        self.num_places = 0.0
        """Sequences that one pipeline can serve at once; 0 where not even one request's KV fits."""
        if self.num_kv_tokens >= self._prompt_tokens + self._output_tokens:
            # Half of its output a sequence holds on average.
            num_held = self._prompt_tokens + self._output_tokens / 2
            self.num_places = min(float(MAX_NUM_SEQS), self.num_kv_tokens / num_held)
        self._batches = (*(b for b in _BATCHES if b < self.num_places), self.num_places)
        self._times: dict[int, _Times] = {}

    @property
    def max_rate(self) -> float:
        """Requests a second that all pipelines together sustain; 0 where not even one request's KV fits."""
        if not self.num_places:
            return 0.0
        full = self._times_at(len(self._batches) - 1)
        return self._num_pipelines * full.num_seqs / full.residence_s

    def num_running(self, demand: Demand) -> float:
        """Sequences that a request finds in its pipeline, itself included; at most ``num_places``."""
        return self._present(demand).num_seqs if self.num_places else 0.0

    def predict(self, demand: Demand) -> Prediction:
        """In the long run at the demand's rate and burstiness."""
        max_rate = self.max_rate
        utilisation = demand.rate / max_rate if max_rate > 0 else math.inf
        if utilisation >= 1:
            return Prediction(
                ttft_s=math.inf,
                tpot_s=math.inf,
                latency_s=math.inf,
                max_rate=max_rate,
                utilisation=utilisation,
                num_kv_tokens=self.num_kv_tokens,
            )
        present = self._present(demand)
        ttft_s = self._wait_s(demand, present) + self._step_wait_s(demand, present)
        ttft_s += self._prompts_wait_s(demand, present) + present.prefill_s
        return Prediction(
            ttft_s=ttft_s,
            tpot_s=present.token_s,
            latency_s=ttft_s + present.residence_s - present.prefill_s,
            max_rate=max_rate,
            utilisation=utilisation,
            num_kv_tokens=self.num_kv_tokens,
        )

    def latency_over(self, demand: Demand, horizon_s: float) -> float:
        """Mean latency of the requests of the next ``horizon_s``, with those that wait now before them: finite also
        beyond capacity, where the queue grows only for so long. Infinite where not even one request's KV fits."""
        if not self.num_places:
            return math.inf
        present = self._present(demand)
        return (
            self._transient_wait_s(demand, present, horizon_s)
            + self._backlog_s(demand, horizon_s)
            + self._step_wait_s(demand, present)
            + self._prompts_wait_s(demand, present)
            + present.residence_s
        )

    def _times_at(self, index: int) -> _Times:
        """With ``_batches[index]`` sequences present. Each is in one of ``depth`` steps in flight: a round of them
        gives it a token, or a chunk."""
        if index in self._times:
            return self._times[index]
        num_seqs = self._batches[index]
        depth = min(float(self.steps.depth), num_seqs)
        rows, chunks = self._per_step(num_seqs / depth)
        plain_pass_s, plain_busiest_s = self.steps.at(self._shape(rows, 0.0))
        chunk_pass_s, chunk_busiest_s = self.steps.at(self._shape(rows, 1.0))
        plain_s, chunk_s = max(plain_busiest_s, plain_pass_s / depth), max(chunk_busiest_s, chunk_pass_s / depth)
        # A request's own chunks make its own prefill longer, not its tokens.
        chunks *= (num_seqs - 1) / num_seqs
        # What the token budget leaves out of a step comes in further ones.
        num_fitting = max(1.0, (TOKEN_BUDGET - rows) * self._num_chunks / self._new_tokens)
        most = _most_chunks(chunks, num_fitting, depth)
        if most <= 1:
            interval_s = plain_s + most * (chunk_s - plain_s)
        else:
            pass_s, busiest_s = self.steps.at(self._shape(rows, most))
            interval_s = max(busiest_s, pass_s / depth)
        interval_s *= max(1.0, chunks / num_fitting)
        token_s = depth * interval_s
        prefill_s = self._num_chunks * (token_s + chunk_pass_s - plain_pass_s)
        times = _Times(
            num_seqs=num_seqs,
            chunk_s=self._num_chunks * (chunk_s - plain_s),
            prefill_s=prefill_s,
            token_s=token_s,
            residence_s=prefill_s + (self._output_tokens - 1) * token_s,
        )
        self._times[index] = times
        return times

    def _per_step(self, num_seqs: float) -> tuple[float, float]:
        """Of so many sequences in a step, how many decode and how many are in their prompt. Each takes a step for each
        chunk and for each token but the first, which comes with the last chunk."""
        decoding = (self._output_tokens - 1) / (self._output_tokens - 1 + self._num_chunks)
        return num_seqs * decoding, num_seqs * (1 - decoding)

    def _shape(self, rows: float, chunks: float) -> StepShape:
        ends = chunks / self._num_chunks
        num_pairs = (self._prompt_tokens**2 - self._hit_tokens**2) / 2
        return StepShape(
            num_tokens=rows + ends * self._new_tokens,
            num_samples=rows + ends,
            num_context_tokens=rows * (self._prompt_tokens + self._output_tokens / 2),
            num_pairs=ends * num_pairs,
        )

    def mean_shape(self, demand: Demand) -> StepShape:
        """The average step under the demand: what a split should be good at."""
        num_seqs = max(1.0, self.num_running(demand))
        return self._shape(*self._per_step(max(1.0, num_seqs / self.steps.depth)))

    def _rate(self, demand: Demand) -> float:
        """Of one pipeline."""
        return demand.rate / self._num_pipelines

    def _arrival_variance(self, demand: Demand) -> float:
        """Squared CV of one pipeline's arrivals, when each request goes to any pipeline by chance."""
        return float(max(0.0, 1 + (demand.cv**2 - 1) / self._num_pipelines))

    def _peakedness(self, demand: Demand) -> float:
        """Variance over mean of the number of requests present, were there many and places for all."""
        return 1 + (self._arrival_variance(demand) - 1) / (1 + demand.service_cv**2)

    def _burst(self, demand: Demand, times: _Times) -> float:
        """How many come with a request, itself included: ``_peakedness`` where many are present; less where a burst is
        over before the next comes. The exponent is fitted to simulated Gamma arrivals."""
        peakedness = self._peakedness(demand)
        if peakedness <= 1:
            return peakedness
        num_present = self._rate(demand) * times.residence_s
        return 1 + (peakedness - 1) * math.sqrt(math.sqrt(num_present / (num_present + peakedness)))

    def _present(self, demand: Demand) -> _Times:
        """The least number n of sequences with ``n = rate * residence(n) + burst``: what a sequence finds, on average,
        with itself. At most all places."""
        rate = self._rate(demand)

        def excess(times: _Times) -> float:
            return times.num_seqs - self._burst(demand, times) - rate * times.residence_s

        index = bisect_left(range(len(self._batches) - 1), 0.0, key=lambda i: excess(self._times_at(i)))
        after = self._times_at(index)
        if index == 0 or excess(after) <= 0:
            return after
        before = self._times_at(index - 1)
        part = excess(before) / (excess(before) - excess(after))
        return _Times(*(a + part * (b - a) for a, b in zip(before, after, strict=True)))

    def _prompts_wait_s(self, demand: Demand, present: _Times) -> float:
        """For other prompts, on average: those that come by chance (as in an M/G/1 queue), and those of a burst."""
        share = min(demand.rate / self.max_rate, self._rate(demand) * present.chunk_s, 0.99)
        variance = (min(1.0, self._arrival_variance(demand)) + demand.service_cv**2) / 2
        by_chance = variance * share / (1 - share)
        return present.chunk_s * (by_chance + max(0.0, self._burst(demand, present) - 1) / 2)

    def _wait_s(self, demand: Demand, present: _Times) -> float:
        """For a place: Allen-Cunneen with Sakasegawa's closed form for the chance of waiting, where Hayward has fewer
        places the more peaked arrivals are. The chance goes by the places taken: short of capacity a pipeline is nearly
        as fast with some sequences as with all."""
        max_rate = self.max_rate / self._num_pipelines
        places = max(1.0, self.num_places / max(1.0, self._peakedness(demand)))
        variance = (self._arrival_variance(demand) + demand.service_cv**2) / 2
        taken = self._rate(demand) * present.residence_s / self.num_places
        chance = math.pow(taken, math.sqrt(2 * (places + 1)) - 1)
        return variance * chance / (max_rate - self._rate(demand))

    def _transient_wait_s(self, demand: Demand, present: _Times, horizon_s: float) -> float:
        """``_wait_s``, but for what a queue that starts empty comes to in time: that of a random walk without drift."""
        variance = self._arrival_variance(demand) + demand.service_cv**2
        limit_s = 2 / 3 * math.sqrt(2 * variance * horizon_s * self._num_pipelines / (math.pi * self.max_rate))
        return min(limit_s, self._wait_s(demand, present)) if demand.rate < self.max_rate else limit_s

    def _backlog_s(self, demand: Demand, horizon_s: float) -> float:
        """Mean wait behind those that wait now and those that come beyond capacity, as a fluid."""
        drift = demand.rate - self.max_rate
        end_s = horizon_s if drift >= 0 else min(horizon_s, -demand.num_waiting / drift)
        return (demand.num_waiting * end_s + drift * end_s**2 / 2) / (self.max_rate * horizon_s)

    def _step_wait_s(self, demand: Demand, present: _Times) -> float:
        """For the step that is being computed, where there is one."""
        depth = min(float(self.steps.depth), present.num_seqs)
        is_busy = min(1.0, self._rate(demand) * present.residence_s)
        return is_busy * present.token_s / depth / 2


def _most_chunks(chunks: float, num_fitting: float, depth: float) -> float:
    """Chunks in that one of ``depth`` steps in flight that has most, if ``chunks`` is the mean and at most
    ``num_fitting`` go into a step. It sets the pace: while it is in one stage, the others are soon idle.

    Where only one fits, each step has one or none; where many do, their number is as good as Poisson.
    """
    if depth == 1:
        return min(chunks, num_fitting)
    one_or_none = 1 - (1 - min(1.0, chunks)) ** depth
    chance = at_most = math.exp(-chunks)
    poisson, j = 0.0, 0
    while j < num_fitting and at_most < 1 - 1e-6:
        poisson += (1 - at_most**depth) * min(1.0, num_fitting - j)
        j += 1
        chance *= chunks / j
        at_most += chance
    return poisson + (one_or_none - poisson) / num_fitting


def predict(profile: ModelProfile, split: Split, demand: Demand) -> Prediction:
    """What ``split`` does under ``demand``, in the long run; times are infinite from its capacity on."""
    return SplitModel(StepTimes(profile, split), demand).predict(demand)
