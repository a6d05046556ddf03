"""The Router's side of a pipeline: starts its stages, sizes the KV, sends steps and receives results."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import TypeVar

from flexpipe_serve.errors import EngineUnavailableError
from flexpipe_serve.kv.capacity import StageFootprint, max_blocks
from flexpipe_serve.kv.domain import DomainFolder
from flexpipe_serve.pipeline.channel import CurveKeys, Endpoint, Outlet, ZmqInbox, ZmqOutlet
from flexpipe_serve.pipeline.layout import Layout
from flexpipe_serve.pipeline.messages import Frame, StepBatch
from flexpipe_serve.pipeline.stage_types import Assignment, StageHandle, StageHost, StageReport, StageSetup

_T = TypeVar("_T")
logger = logging.getLogger(__name__)
_START_S = 300.0
_REPORT_S = 10.0
CPU_SHARE = 0.6
"""Of the free memory of a node, taken where no budget is given."""
GPU_SHARE = 0.9


@dataclass(frozen=True, kw_only=True)
class KVBudget:
    """How the number of KV blocks follows from memory."""

    budget_bytes: int | None
    """Of each domain; None: a share of what is free."""
    block_bytes: int
    """One block of one layer."""
    max_blocks: int | None
    """Upper limit beside the budget."""


class Pipeline:
    """One layout with its stages.

    ``start`` and ``stop`` may block for long and belong to one control thread; ``send`` and ``receive`` belong to the
    thread that started last to use them (the engine's), and never block on a stage.

    Args:
        host: where stages run.
        setup: what all stages have in common; each gets its own name.
        on_lost: called from some thread when a stage ends unasked; with its name and the reason.
    """

    def __init__(
        self,
        host: StageHost,
        *,
        setup: StageSetup,
        budget: KVBudget,
        on_lost: Callable[[str, str], None],
        keys: CurveKeys | None = None,
    ) -> None:
        self._host = host
        self._setup = setup
        self._budget = budget
        self._on_lost = on_lost
        self._keys = keys
        self._folder = DomainFolder(setup.domain_key)
        self._inbox = ZmqInbox("router", folder=self._folder.path, node=host.node, keys=keys)
        self._stages: dict[str, StageHandle] = {}
        self._outlets: dict[str, Outlet] = {}
        self._expected_ends: set[str] = set()
        self._lock = threading.Lock()
        self.epoch = 0
        self.layout: Layout | None = None
        self.num_blocks = 0

    # ------------------------------------------------------------------ control

    def start(self, layout: Layout) -> int:
        """Bring up ``layout`` under a new epoch, reusing stages that live; all KV is void afterwards.

        Returns:
            The number of KV blocks.

        Raises:
            ConfigError: the memory budget is too small.
            EngineUnavailableError: a stage could not be started or was lost meanwhile.
        """
        for name in set(self._stages) - set(layout.stages):
            self._end(name)
        for name in layout.stages:
            if name not in self._stages:
                self._stages[name] = self._launch(name)
        reports = self._gather({name: self._stages[name].report() for name in layout.stages}, _START_S)
        # A stage adopted from an earlier Router has seen that one's epochs.
        self.epoch = max(self.epoch, *(r.epoch for r in reports.values())) + 1
        free = {r.domain: r.domain_free_bytes for r in reports.values()}
        for report in reports.values():  # what adopted stages hold is theirs to keep
            free[report.domain] += report.weights_bytes + report.overhead_bytes + report.kv_bytes
        endpoints = [reports[name].endpoint for name in layout.stages]
        assignments = self._assignments(layout, endpoints)
        reports = self._gather({n: self._stages[n].configure(a) for n, a in assignments.items()}, _START_S)
        self.num_blocks = self._count_blocks(layout, reports, free)
        self._gather({n: self._stages[n].commit_kv(self.num_blocks) for n in layout.stages}, _START_S)
        for outlet in self._outlets.values():
            outlet.close()
        self._outlets = {
            name: ZmqOutlet(endpoint, node=self._host.node, keys=self._keys)
            for name, endpoint in zip(layout.stages, endpoints, strict=True)
        }
        self.layout = layout
        return self.num_blocks

    def stop(self) -> None:
        """End all stages and remove what they shared."""
        for name in list(self._stages):
            self._end(name)
        self.detach()

    def detach(self) -> None:
        """Let go of the stages without ending them."""
        for outlet in self._outlets.values():
            outlet.close()
        self._outlets = {}
        self._inbox.close()
        self._folder.close()

    def forget(self, name: str) -> None:
        """A stage is lost: the next ``start`` makes a new one of that name."""
        self._stages.pop(name, None)

    @property
    def is_complete(self) -> bool:
        """Whether every stage of the layout in force is there, as far as is known."""
        return self.layout is not None and self._stages.keys() >= set(self.layout.stages)

    def reports(self) -> list[StageReport]:
        """The stages' states in pipeline order; also their sign of life from the Router.

        Raises:
            EngineUnavailableError: a stage does not answer.
        """
        layout = self.layout
        if layout is None:
            return []
        futures = {name: self._stages[name].report() for name in layout.stages if name in self._stages}
        return list(self._gather(futures, _REPORT_S).values())

    def _launch(self, name: str) -> StageHandle:
        logger.info("starting stage %s", name)
        stage = self._host.launch(replace(self._setup, name=name))

        def ended(future: Future[None]) -> None:
            with self._lock:
                expected = name in self._expected_ends or self._stages.get(name) is not stage
            if not expected:
                error = future.exception()
                self._on_lost(name, str(error).splitlines()[0] if error else "it ended itself")

        self._stages[name] = stage
        stage.watch().add_done_callback(ended)
        return stage

    def _end(self, name: str) -> None:
        with self._lock:
            self._expected_ends.add(name)
        self._stages.pop(name).stop()
        with self._lock:
            self._expected_ends.discard(name)

    def _assignments(self, layout: Layout, endpoints: Sequence[Endpoint]) -> dict[str, Assignment]:
        nexts = [*endpoints[1:], self._inbox.endpoint]
        return {
            part.stage: Assignment(
                epoch=self.epoch,
                start=part.start,
                stop=part.stop,
                is_first=i == 0,
                is_last=i == layout.num_stages - 1,
                next=nexts[i],
            )
            for i, part in enumerate(layout.slices)
        }

    def _count_blocks(self, layout: Layout, reports: Mapping[str, StageReport], free: Mapping[str, int]) -> int:
        footprints = [
            StageFootprint(
                stage=name,
                domain=reports[name].domain,
                num_layers=reports[name].stop - reports[name].start,
                weights_bytes=reports[name].weights_bytes,
                overhead_bytes=reports[name].overhead_bytes,
            )
            for name in layout.stages
        ]
        budget = self._budget
        share = CPU_SHARE if self._setup.device == "cpu" else GPU_SHARE
        budgets = {domain: budget.budget_bytes or int(share * free[domain]) for domain in free}
        blocks = max_blocks(footprints=footprints, budgets=budgets, block_bytes=budget.block_bytes)
        return min(blocks, self._setup.max_blocks, budget.max_blocks or blocks)

    @staticmethod
    def _gather(futures: Mapping[str, Future[_T]], timeout_s: float) -> dict[str, _T]:
        results = {}
        for name, future in futures.items():
            try:
                results[name] = future.result(timeout_s)
            except TimeoutError as error:
                raise EngineUnavailableError(f"stage {name!r} did not answer within {timeout_s:.0f} s.") from error
        return results

    # ------------------------------------------------------------------ data

    def send(self, batch: StepBatch) -> None:
        """Send a step's metadata to every stage of the route at once; each can prepare early."""
        frames = batch.encode()
        for outlet in self._outlets.values():
            outlet.send(frames)

    def receive(self, timeout_s: float) -> Sequence[Frame] | None:
        """The next message of the last stage; None after the time, or when woken."""
        return self._inbox.receive(timeout_s)

    def wake(self) -> None:
        """Interrupt ``receive``; any thread may call it."""
        self._inbox.wake()
