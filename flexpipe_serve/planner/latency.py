"""What a split would do under a demand: batch, waiting, times, capacity. Pure code, in closed forms.

A step takes the longer the more sequences there are, and the longer it takes the more there are (Little's law). There
are places for so many; beyond them requests queue (Allen-Cunneen).
"""

from __future__ import annotations

import math
from bisect import bisect_left

from flexpipe_serve.planner.profile import ModelProfile, StepShape
from flexpipe_serve.planner.request_times import RequestTimes, Times
from flexpipe_serve.planner.step_times import StepTimes
from flexpipe_serve.planner.types import Demand, Prediction, SchedulerLimits, Split


class SplitModel:
    """A split under a demand.

    Args:
        max_kv_tokens: upper limit of the KV beside memory's.
        requests: what is known already for these lengths.
    """

    steps: StepTimes
    num_kv_tokens: int
    num_places: float
    """Sequences that one pipeline can serve at once; 0 where not even one request's KV fits."""
    max_rate: float
    """Requests a second that all pipelines together sustain."""
    utilisation: float
    """Demanded rate over ``max_rate``."""

    def __init__(
        self,
        steps: StepTimes,
        demand: Demand,
        *,
        max_kv_tokens: int | None = None,
        requests: RequestTimes | None = None,
    ) -> None:
        self.steps = steps
        self._demand = demand
        self._num_pipelines = steps.split.num_pipelines
        self.num_kv_tokens = steps.num_kv_tokens
        if max_kv_tokens is not None:
            self.num_kv_tokens = min(self.num_kv_tokens, max_kv_tokens)
        self._requests = requests or RequestTimes(steps, demand, num_kv_tokens=self.num_kv_tokens)
        self.num_places = self._requests.num_places
        # Of one pipeline, when each request goes to any by chance: its rate and its arrivals' squared CV.
        self._rate = demand.rate / self._num_pipelines
        self._arrival_variance = max(0.0, 1 + (demand.cv**2 - 1) / self._num_pipelines)
        self._service_variance = demand.service_cv**2
        self._peakedness = 1 + (self._arrival_variance - 1) / (1 + self._service_variance)
        self.max_rate = 0.0
        self.utilisation = math.inf
        if self.num_places:
            full = self._requests.at(len(self._requests.batches) - 1)
            self.max_rate = self._num_pipelines * full.num_seqs / full.residence_s
            self.utilisation = demand.rate / self.max_rate
            self._present = self._find_present()

    @property
    def num_present(self) -> float:
        """Sequences that a request finds in its pipeline, itself included; at most ``num_places``."""
        return self._present.num_seqs if self.num_places else 0.0

    @property
    def unloaded_latency_s(self) -> float:
        """Of a request that is alone; infinite where it does not fit."""
        return self._requests.at(0).residence_s if self.num_places else math.inf

    def mean_shape(self) -> StepShape:
        """The average step: what a split should be good at."""
        return self._requests.mean_shape(max(1.0, self.num_present))

    def predict(self) -> Prediction:
        """In the long run; times are infinite from capacity on."""
        ttft_s = tpot_s = latency_s = math.inf
        if self.utilisation < 1:
            wait_s = self._wait_s() + self._inner_wait_s()
            ttft_s = wait_s + self._present.prefill_s
            tpot_s = self._present.token_s
            latency_s = wait_s + self._present.residence_s
        return Prediction(
            ttft_s=ttft_s,
            tpot_s=tpot_s,
            latency_s=latency_s,
            max_rate=self.max_rate,
            utilisation=self.utilisation,
            num_kv_tokens=self.num_kv_tokens,
        )

    def latency_over(self, horizon_s: float) -> float:
        """Mean latency of the requests of the next ``horizon_s``, with those that run and wait now before them: finite
        also beyond capacity, where the queue grows only for so long. Infinite where not even one request's KV fits."""
        if not self.num_places:
            return math.inf
        # A queue that starts empty comes to no more in time than a random walk without drift.
        variance = self._arrival_variance + self._service_variance
        wait_s = 2 / 3 * math.sqrt(2 * variance * horizon_s * self._num_pipelines / (math.pi * self.max_rate))
        if self.utilisation < 1:
            wait_s = min(wait_s, self._wait_s())
        num_present = self._mean_present(horizon_s)
        num_queued = max(0.0, num_present - self.num_places)
        num_seqs = min(num_present + self._burst(self._present), self.num_places)
        stay_s = self._requests.with_seqs(num_seqs).residence_s + num_queued * self._num_pipelines / self.max_rate
        return wait_s + self._inner_wait_s() + stay_s

    def _mean_present(self, horizon_s: float) -> float:
        """Requests in a pipeline or its queue over the horizon, as a fluid: what is too many now drains, what is beyond
        capacity piles up."""
        drift = self._rate - self.max_rate / self._num_pipelines
        num_present = (self._demand.num_running + self._demand.num_waiting) / self._num_pipelines
        num_final = self._rate * self._present.residence_s if drift < 0 else self.num_places
        excess = num_present - num_final
        if excess <= 0:
            # No more can have piled up than have come.
            return min(num_final + max(0.0, drift) * horizon_s / 2, num_present + self._rate * horizon_s / 2)
        end_s = horizon_s if drift >= 0 else min(horizon_s, -excess / drift)
        return num_final + (excess * end_s + drift * end_s**2 / 2) / horizon_s

    def _find_present(self) -> Times:
        """The least number n of sequences with ``n = rate * residence(n) + burst``: what a request finds, on average,
        with itself. At most all places."""
        batches = self._requests.batches
        index = 0
        while (missing := self._missing(index)) > 0:
            # With more there residences are longer, if anything: it is no number below what a request finds here.
            index = bisect_left(batches, batches[index] + missing, index + 1)
            if index == len(batches):
                return self._requests.at(index - 1)
        missing_before = 0.0
        while index and (missing_before := self._missing(index - 1)) <= 0:
            index, missing = index - 1, missing_before
        if index == 0:
            return self._requests.at(0)
        part = missing_before / (missing_before - missing)
        return self._requests.with_seqs(batches[index - 1] + part * (batches[index] - batches[index - 1]))

    def _missing(self, index: int) -> float:
        """How many more than ``batches[index]`` a request finds when so many are there."""
        times = self._requests.at(index)
        return self._burst(times) + self._rate * times.residence_s - times.num_seqs

    def _burst(self, times: Times) -> float:
        """How many come with a request, itself included. Where many are present, that is arrivals' peakedness, the
        variance over mean of how many would be present were there places for all; less where a burst is over before
        the next comes. The exponent is fitted to simulated Gamma arrivals."""
        peakedness = self._peakedness
        if peakedness <= 1:
            return peakedness
        num_present = self._rate * times.residence_s
        return 1 + (peakedness - 1) * math.sqrt(math.sqrt(num_present / (num_present + peakedness)))

    def _wait_s(self) -> float:
        """For a place, short of capacity: Allen-Cunneen with Sakasegawa's closed form for the chance of waiting, where
        Hayward has fewer places the more peaked arrivals are. The chance goes by the places taken: a pipeline is nearly
        as fast with some sequences as with all."""
        places = max(1.0, self.num_places / max(1.0, self._peakedness))
        # At capacity all are taken, even where fewer sequences got on as fast.
        taken = max(
            self._rate * self._present.residence_s / self.num_places, math.pow(self.utilisation, self.num_places)
        )
        chance = math.pow(taken, math.sqrt(2 * (places + 1)) - 1)
        variance = (self._arrival_variance + self._service_variance) / 2
        return variance * chance / (self.max_rate / self._num_pipelines - self._rate)

    def _inner_wait_s(self) -> float:
        """Of a request that has its place: for the step that is being computed, and for the prompts of others, those
        that come by chance (as in an M/G/1 queue) and those of a burst."""
        present = self._present
        is_busy = min(1.0, self._rate * present.residence_s)
        share = min(self.utilisation, self._rate * present.chunks_s, 0.99)
        variance = (min(1.0, self._arrival_variance) + self._service_variance) / 2
        num_before = variance * share / (1 - share) + max(0.0, self._burst(present) - 1) / 2
        return is_busy * present.token_s / self.steps.depth / 2 + num_before * present.chunks_s


def predict(
    profile: ModelProfile, split: Split, demand: Demand, *, limits: SchedulerLimits | None = None
) -> Prediction:
    """What ``split`` does under ``demand``, in the long run; times are infinite from its capacity on."""
    return SplitModel(StepTimes(profile, split, limits or SchedulerLimits()), demand).predict()
