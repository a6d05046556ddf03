"""How long a refactoring takes in virtual time, and what it holds up: pure code.

As on the server: processes are started, weights are loaded by a thread that yields to the stages that compute, KV that
leaves its domain is copied at a limited rate, then the route switches between two steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from flexpipe_serve.errors import RefactorRefusedError
from flexpipe_serve.planner.cost import GENTLE, HURRIED, LoadPace
from flexpipe_serve.planner.profile import ModelProfile
from flexpipe_serve.planner.transition import Transition
from flexpipe_serve.planner.types import Split
from flexpipe_serve.simulate.events import EventQueue
from flexpipe_serve.simulate.pipeline import BLOCK_SIZE, SimulatedPipeline

_LOOK_S = 0.1
"""How often loading looks whether the stages compute."""


@dataclass(frozen=True, kw_only=True)
class RefactoringTimes:
    """The rates that a refactoring goes by."""

    start_s: float = 4.0
    """A stage's process."""
    gentle: LoadPace = GENTLE
    hurried: LoadPace = HURRIED
    migration_bytes_per_s: float = 4e7
    """Of KV from one domain to another."""


class SimulatedRefactoring:
    """From one split to another; :meth:`begin` and wait for ``switch``.

    Args:
        hurry: load quickly.
        pipelines: those that are there before and after.
        switch: called once, when steps may take the new route.
    """

    def __init__(
        self,
        events: EventQueue,
        profile: ModelProfile,
        *,
        old: Split,
        new: Split,
        times: RefactoringTimes,
        hurry: bool,
        pipelines: Sequence[SimulatedPipeline],
        switch: Callable[[], None],
    ) -> None:
        self._events = events
        self._times = times
        self._pace = times.hurried if hurry else times.gentle
        self._pipelines = pipelines
        self._switch = switch
        self._transition = Transition(profile, old, new)
        self._kv_bytes_per_token = profile.kv_bytes_per_token
        self._load_s = max(self._transition.load_s, self._transition.busy_load_s)

    def begin(self) -> None:
        """Shrink the KV where both splits do not fit otherwise, and start.

        Raises:
            RefactorRefusedError: it does not fit; nothing has changed.
        """
        num_blocks = self._transition.num_kv_tokens // BLOCK_SIZE
        for pipeline in self._pipelines:
            stats = pipeline.scheduler.stats()
            needed = max(1, pipeline.scheduler.num_blocks_needed)
            if num_blocks < min(needed, stats.num_blocks):
                raise RefactorRefusedError(
                    f"only {num_blocks} KV blocks would be left while it runs, but {needed} are needed."
                )
        for pipeline in self._pipelines:
            if num_blocks < pipeline.scheduler.stats().num_blocks:
                pipeline.scheduler.shrink(num_blocks)
        self._slow(self._times.gentle.slowdown)
        self._events.after(self._times.start_s if self._transition.num_started else 0.0, self._load)

    def _load(self) -> None:
        """Until all weights are there: at full speed while nothing computes."""
        if self._load_s <= 0:
            self._slow(self._times.gentle.slowdown)
            self._copy()
            return
        self._slow(self._pace.slowdown)
        is_idle = all(pipeline.is_idle for pipeline in self._pipelines)
        speed = 1.0 if is_idle else self._pace.share
        seconds = min(_LOOK_S, self._load_s / speed)
        self._load_s -= seconds * speed
        self._events.after(seconds, self._load)

    def _copy(self) -> None:
        num_tokens = sum(p.scheduler.stats().num_used_blocks for p in self._pipelines) * BLOCK_SIZE
        num_bytes = self._transition.num_copied_layers * self._kv_bytes_per_token * num_tokens / len(self._pipelines)
        self._events.after(num_bytes / self._times.migration_bytes_per_s, self._try_to_switch)

    def _try_to_switch(self) -> None:
        if not all(pipeline.scheduler.is_shrunk for pipeline in self._pipelines):
            for pipeline in self._pipelines:
                pipeline.fill()  # copies ride in steps
            self._events.after(_LOOK_S, self._try_to_switch)
            return
        self._slow(0.0)
        self._switch()

    def _slow(self, share: float) -> None:
        for pipeline in self._pipelines:
            pipeline.slowdown = share
