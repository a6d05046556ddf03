"""What it costs those who are being served when a pipeline changes: pure code."""

from __future__ import annotations

from typing import NamedTuple

from flexpipe_serve.planner.latency import SplitModel
from flexpipe_serve.planner.profile import StepShape
from flexpipe_serve.planner.request_times import num_places
from flexpipe_serve.planner.transition import Transition
from flexpipe_serve.planner.types import Demand, PlannerState

_START_S = 4.0
"""Until a stage's process that has to be started can load."""


class LoadPace(NamedTuple):
    """How weights are loaded while the cores are wanted."""

    share: float
    """Of a core, that loading gets."""
    slowdown: float
    """Share by which everybody is slower meanwhile."""


GENTLE = LoadPace(share=0.027, slowdown=0.03)
"""Nobody is to notice."""
HURRIED = LoadPace(share=0.5, slowdown=0.5)
"""A quarter to a half of the tokens were lost in a benchmark's hurried moments."""


class Cost(NamedTuple):
    """Of getting there."""

    cost_s: float
    """Seconds of request latency, summed over the requests that are there meanwhile."""
    duration_s: float
    hurried_duration_s: float
    """The same in a hurry, when the cores are wanted all the time."""


def transition_cost(
    transition: Transition,
    state: PlannerState,
    demand: Demand,
    *,
    present: SplitModel,
    latency_s: float,
    pace: LoadPace,
) -> Cost:
    """What the transition costs under ``demand``.

    Everybody is slower while it runs, waits longer where the KV shrinks meanwhile, and the sequences of a pipeline that
    ends are computed again.

    Args:
        present: the split that serves meanwhile.
        latency_s: what a request takes there.
        pace: of loading.
    """
    profile, limits = present.steps.profile, present.steps.limits
    num_running = demand.rate * latency_s
    busy_share = 1 - (1 - pace.share) * min(1.0, num_running)
    copied_bytes = transition.num_copied_layers * profile.kv_bytes_per_token * state.num_kv_tokens_in_use
    fixed_s = (_START_S if transition.num_started else 0.0) + copied_bytes / state.migration_bytes_per_s
    load_s = max(transition.load_s, transition.busy_load_s / busy_share)
    duration_s = fixed_s + load_s
    longer_s = 0.0
    if (
        duration_s > 0
        and num_places(demand, transition.num_kv_tokens, max_num_seqs=limits.max_num_seqs) < present.num_places
    ):
        shrunk = SplitModel(present.steps, demand, max_kv_tokens=transition.num_kv_tokens)
        longer_s = shrunk.latency_over(duration_s) - present.latency_over(duration_s)
        longer_s = min(max(0.0, longer_s), duration_s)
    slower_s = (GENTLE.slowdown * fixed_s + pace.slowdown * load_s) * latency_s
    cost_s = demand.rate * (slower_s + duration_s * longer_s)
    if transition.share_replayed:
        num_tokens = limits.max_num_batched_tokens
        num_chunks = transition.share_replayed * state.num_kv_tokens_in_use / num_tokens
        chunk = StepShape(
            num_tokens=num_tokens, num_samples=1, num_pairs=num_tokens * (demand.prompt_tokens + num_tokens) / 2
        )
        pass_s, _ = present.steps.at(chunk)
        # They wait for each other: half of all chunks, on average.
        cost_s += transition.share_replayed * demand.num_running * num_chunks * pass_s / 2
    return Cost(cost_s, duration_s, fixed_s + max(transition.load_s, transition.busy_load_s / HURRIED.share))
