"""The Router's side of a pipeline: its stages, and the routes that steps take through them."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import TypeVar

from flexpipe_serve.config import StageCpus
from flexpipe_serve.errors import EngineUnavailableError
from flexpipe_serve.kv.domain import DomainFolder
from flexpipe_serve.pipeline.budget import KVBudget, count_blocks, domain_budgets
from flexpipe_serve.pipeline.channel import CurveKeys, Endpoint, Outlet
from flexpipe_serve.pipeline.inbox import Inbox, connect
from flexpipe_serve.pipeline.layout import Layout
from flexpipe_serve.pipeline.messages import Frame, StepBatch
from flexpipe_serve.pipeline.stage_types import (
    Assignment,
    Incoming,
    StageHandle,
    StageHost,
    StageReport,
    StageSetup,
    folder_key,
)
from flexpipe_serve.placement.nodes import mark_draining, usable_nodes
from flexpipe_serve.placement.topology import DeviceKind, Topology

_T = TypeVar("_T")
logger = logging.getLogger(__name__)
_START_S = 300.0
_REPORT_S = 10.0


class Pipeline:
    """Stages, and the layout in force.

    Methods under *control* may block and are called by one thread at a time (the engine's control side); those under
    *data* belong to the engine thread and never block on a stage.

    Args:
        host: where stages run.
        setup: what all stages have in common; each gets its own name.
        max_depth: steps in flight at once, up to the number of stages; None: as many as compute at the same time.
        stage_cpus: cores of single stages, by name.
        on_lost: called from some thread when a stage ends unasked; with its name and the reason.
    """

    def __init__(
        self,
        host: StageHost,
        *,
        setup: StageSetup,
        budget: KVBudget,
        max_depth: int | None = None,
        stage_cpus: Mapping[str, StageCpus] | None = None,
        on_lost: Callable[[str, str], None],
        keys: CurveKeys | None = None,
    ) -> None:
        self._host = host
        self._setup = setup
        self.budget = budget
        self._max_depth = max_depth
        self._stage_cpus = stage_cpus or {}
        self._on_lost = on_lost
        self._keys = keys
        self._folder = DomainFolder(folder_key(setup.domain_key, host.node))
        self._inbox = Inbox("router", folder=self._folder.path, node=host.node, keys=keys)
        self._stages: dict[str, StageHandle] = {}
        self._endpoints: dict[str, Endpoint] = {}
        self._computes: dict[str, str] = {}
        """What each stage computes with."""
        self._domains: dict[str, str] = {}
        self._homes: dict[str, str] = {}
        """Node where each stage stands or is to stand."""
        self.avoid = frozenset(host.read_drained())
        """Nodes where no stage is launched any more."""
        self._expected_ends: set[str] = set()
        self._lock = threading.Lock()
        self._last_epoch = 0
        self._routes: dict[int, dict[str, Outlet]] = {}
        self.epoch = 0
        """Of the steps that are scheduled now."""
        self.layout: Layout | None = None
        self.budgets: dict[str, int] = {}
        """Bytes by domain."""

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
            self.end(name)
        launches = {name: self.launch(name) for name in layout.stages}
        reports = self._gather(launches, _START_S)
        for future in launches.values():
            self._note_endpoint(future)  # its own callback may still be on the way
        # A stage adopted from an earlier Router has seen that one's epochs.
        self._last_epoch = max(self._last_epoch, *(r.epoch for r in reports.values()))
        epoch = self.new_epoch()
        self.budgets = domain_budgets(reports.values(), self.budget)
        assignments = self.assignments(layout, epoch)
        reports = self._gather(
            {n: self._stages[n].prepare(a, num_blocks=0, fresh=True) for n, a in assignments.items()}, _START_S
        )
        num_blocks = count_blocks(layout, reports, budgets=self.budgets, budget=self.budget)
        self._gather({n: self._stages[n].resize_kv(num_blocks, fresh=True) for n in layout.stages}, _START_S)
        route = self.connect(layout)
        for old in list(self._routes):
            self.drop_route(old)
        self.take_route(layout, epoch=epoch, route=route)
        return num_blocks

    def stop(self) -> None:
        """End all stages and remove what they shared."""
        for name in list(self._stages):
            self.end(name)
        self.detach()

    def detach(self) -> None:
        """Let go of the stages without ending them."""
        for epoch in list(self._routes):
            self.drop_route(epoch)
        self._inbox.close()
        self._folder.close()

    def launch(self, name: str, *, node: str | None = None) -> Future[StageReport]:
        """Have a stage of that name: the one that is there, one left by an earlier Router, or a new one.

        Ends when it answers.

        Args:
            node: where a new one must run; None: where it was placed, or wherever the host likes.

        Raises:
            EngineUnavailableError: no node is left where it might.
        """
        with self._lock:
            stage = self._stages.get(name)
        if stage is None:
            node = node or self._find_place(name)
            logger.info("starting stage %s on node %s", name, node or "(any)")
            stage = self._host.launch(self._setup_of(name), node=node)
            with self._lock:
                self._stages[name] = stage
            stage.watch().add_done_callback(self._end_watcher(name, stage))
        report = stage.report()
        report.add_done_callback(self._note_endpoint)
        return report

    def end(self, name: str) -> None:
        """End a stage and everything it holds; unknown ones are ignored."""
        with self._lock:
            stage = self._stages.pop(name, None)
            self._endpoints.pop(name, None)
            self._homes.pop(name, None)
            self._expected_ends.add(name)
        if stage is not None:
            stage.stop()
        with self._lock:
            self._expected_ends.discard(name)

    def forget(self, name: str) -> None:
        """A stage is lost: the next launch makes a new one of that name."""
        with self._lock:
            self._stages.pop(name, None)
            self._endpoints.pop(name, None)
            self._homes.pop(name, None)

    def place(self, node_of: Mapping[str, str]) -> None:
        """Say where stages shall stand that are launched from now on, by name."""
        with self._lock:
            self._homes.update({name: node for name, node in node_of.items() if name not in self._stages})

    def topology(self) -> Topology:
        """The nodes and devices as they are now."""
        return self._host.topology(kind=DeviceKind(self._setup.device))

    def usable_nodes(self, topology: Topology, *, avoid: Collection[str] = ()) -> tuple[str, ...]:
        """Names of the nodes where a stage may be launched: they live and stay, and can be reached."""
        found = usable_nodes(mark_draining(topology, {*self.avoid, *avoid}))
        return found if self._keys is not None else tuple(node for node in found if node == self._host.node)

    def read_drained(self) -> dict[str, float]:
        """See StageHost.read_drained."""
        return self._host.read_drained()

    def write_drained(self, deadlines: Mapping[str, float]) -> None:
        """See StageHost.write_drained."""
        self._host.write_drained(deadlines)

    @property
    def node_of(self) -> dict[str, str]:
        """The node of every stage alive, as far as is known."""
        with self._lock:
            return {name: self._homes[name] for name in self._stages if name in self._homes}

    @property
    def homes(self) -> dict[str, str]:
        """The node where each stage stands or is to stand, as far as is known."""
        with self._lock:
            return dict(self._homes)

    @property
    def setup(self) -> StageSetup:
        """What all stages have in common."""
        return self._setup

    @property
    def router_node(self) -> str:
        """Where the Router runs."""
        return self._host.node

    def stage(self, name: str) -> StageHandle:
        """Grip on a stage.

        Raises:
            EngineUnavailableError: it is lost.
        """
        with self._lock:
            stage = self._stages.get(name)
        if stage is None:
            raise EngineUnavailableError(f"stage {name!r} is lost.")
        return stage

    @property
    def stages(self) -> tuple[str, ...]:
        """Names of all stages alive, also warm ones without layers."""
        with self._lock:
            return tuple(self._stages)

    @property
    def is_complete(self) -> bool:
        """Whether every stage of the layout in force is there, as far as is known."""
        return self.layout is not None and set(self.stages) >= set(self.layout.stages)

    def reports(self) -> dict[str, StageReport]:
        """States of all stages that are up; asking is also the Router's sign of life to them.

        Raises:
            EngineUnavailableError: a stage does not answer.
        """
        with self._lock:
            # One that is still starting would keep all others waiting.
            stages = {name: stage for name, stage in self._stages.items() if name in self._endpoints}
        return self._gather({name: stage.report() for name, stage in stages.items()}, _REPORT_S)

    def new_epoch(self) -> int:
        """An epoch number never used before."""
        self._last_epoch += 1
        return self._last_epoch

    def assignments(
        self, layout: Layout, epoch: int, incoming: Mapping[str, tuple[Incoming, ...]] | None = None
    ) -> dict[str, Assignment]:
        """Each stage's part in ``layout``; the stages have been launched.

        Args:
            incoming: layers whose KV is copied to a stage, by stage.
        """
        nexts = [*(self._endpoints[name] for name in layout.stages[1:]), self._inbox.endpoint]
        return {
            part.stage: Assignment(
                epoch=epoch,
                start=part.start,
                stop=part.stop,
                is_first=i == 0,
                is_last=i == layout.num_stages - 1,
                next=nexts[i],
                incoming=(incoming or {}).get(part.stage, ()),
            )
            for i, part in enumerate(layout.slices)
        }

    def endpoint(self, name: str) -> Endpoint:
        """Where a launched stage listens."""
        return self._endpoints[name]

    def domain(self, name: str) -> str:
        """Whose memory a launched stage takes."""
        return self._domains[name]

    def depth(self, layout: Layout) -> int:
        """Steps to keep in flight. Stages that share a node's cores (or a GPU) do not gain from computing at the same
        time: each of two half-sized steps reads all weights again, where one step has all cores for it."""
        if self._max_depth is not None:
            return min(self._max_depth, layout.num_stages)
        return len({self._computes[name] for name in layout.stages})

    def connect(self, layout: Layout) -> dict[str, Outlet]:
        """Channels to every stage of ``layout``, for ``take_route``."""
        return {name: connect(self._endpoints[name], node=self._host.node, keys=self._keys) for name in layout.stages}

    def _find_place(self, name: str) -> str | None:
        if self._keys is None:
            return self._host.node  # no other could be reached
        with self._lock:
            home = self._homes.get(name)
        if home is None and not self.avoid:
            return None
        usable = self.usable_nodes(self.topology())
        if home in usable:
            return home
        if not self.avoid:
            return None
        if not usable:
            raise EngineUnavailableError(
                f"there is no node for stage {name!r}: all that live are being drained. Add a node, or undrain one."
            )
        taken = list(self.node_of.values())
        return min(usable, key=taken.count)

    def _setup_of(self, name: str) -> StageSetup:
        cpus = self._stage_cpus.get(name)
        if cpus is None:
            return replace(self._setup, name=name)
        return replace(self._setup, name=name, cores=cpus.cores, cpu_share=cpus.share)

    def _end_watcher(self, name: str, stage: StageHandle) -> Callable[[Future[None]], None]:
        def ended(future: Future[None]) -> None:
            with self._lock:
                expected = name in self._expected_ends or self._stages.get(name) is not stage
            if not expected:
                error = future.exception()
                self._on_lost(name, str(error).splitlines()[0] if error else "it ended itself")

        return ended

    def _note_endpoint(self, answer: Future[StageReport]) -> None:
        if answer.exception() is None:
            report = answer.result()
            with self._lock:
                if report.name in self._stages:
                    self._endpoints[report.name] = report.endpoint
                    self._homes[report.name] = report.node
                    self._computes[report.name] = report.compute
            self._domains[report.name] = report.domain

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

    def take_route(self, layout: Layout, *, epoch: int, route: Mapping[str, Outlet]) -> None:
        """The layout in force from now on; the routes of older epochs stay until they are dropped."""
        self._routes[epoch] = dict(route)
        self.layout = layout
        self.epoch = epoch

    def drop_route(self, epoch: int) -> None:
        """No step takes this epoch's route any more."""
        for outlet in self._routes.pop(epoch, {}).values():
            outlet.close()

    def send(self, batch: StepBatch) -> None:
        """Send a step's metadata to every stage of its epoch's route at once; each can prepare early."""
        frames = batch.encode()
        for outlet in self._routes[batch.header.epoch].values():
            outlet.send(frames)

    def send_on_route(self, epoch: int, stage: str, frames: Sequence[Frame]) -> None:
        """Send a message to one stage, in order with the steps of an epoch."""
        self._routes[epoch][stage].send(frames)

    def receive(self, timeout_s: float) -> Sequence[Frame] | None:
        """The next message of the last stage; None after the time, or when woken."""
        return self._inbox.receive(timeout_s)

    def wake(self) -> None:
        """Interrupt ``receive``; any thread may call it."""
        self._inbox.wake()
