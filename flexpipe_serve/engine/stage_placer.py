"""Nodes for the stages of one pipeline: asks the allocator with what the pipeline needs and may take."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping

import msgspec

from flexpipe_serve.pipeline.layout import Layout
from flexpipe_serve.pipeline.pipeline import Pipeline
from flexpipe_serve.pipeline.stage_types import StageReport
from flexpipe_serve.placement.allocation import Refusal, StageDemand
from flexpipe_serve.placement.node_choice import choose_nodes
from flexpipe_serve.placement.nodes import mark_draining
from flexpipe_serve.placement.placements import Placements
from flexpipe_serve.placement.topology import Device, Topology
from flexpipe_serve.refactor.feasibility import ModelWeights

_PROCESS_BYTES = 512 << 20
"""Assumed of a stage's process beside weights and KV, until one has told."""


class StagePlacer:
    """On a single node there is nothing to choose, and it does nothing. Any thread may call its methods.

    Args:
        weights: bytes of the model.
        placements: of all pipelines of the application.
        note: writes an event, given its kind and its message.
    """

    def __init__(
        self, pipeline: Pipeline, weights: ModelWeights, placements: Placements, *, note: Callable[[str, str], None]
    ) -> None:
        self._pipeline = pipeline
        self._weights = weights
        self._placements = placements
        self._note = note
        self._key = pipeline.setup.domain_key
        self._overhead_bytes = 0
        self._is_over = False

    def close(self) -> None:
        """The pipeline has ended."""
        self._is_over = True
        self._placements.note(self._key, {}, at=time.monotonic())

    def update(self, reports: Mapping[str, StageReport]) -> None:
        """Note where the pipeline's stages stand."""
        if self._is_over:
            return
        self._overhead_bytes = max((r.overhead_bytes for r in reports.values()), default=self._overhead_bytes)
        total = self._weights.of(range(len(self._weights.layers)), is_first=True, is_last=True)
        self._placements.note(
            self._key,
            {name: report.node for name, report in reports.items()},
            at=time.monotonic(),
            cached_shares={
                r.node: min(1.0, r.host_cache.used_bytes / total) for r in reports.values() if r.host_cache is not None
            },
        )

    def place(self, layout: Layout) -> None:
        """Give each stage that neither runs nor has a node yet one; they are about to be launched.

        Where the allocator finds no room, the host chooses as it likes, and an event says so: memory was estimated,
        and the start may yet succeed.
        """
        topology = self._pipeline.topology()
        usable = self._pipeline.usable_nodes(topology)
        if len(usable) < 2:
            return
        homes = {name: node for name, node in self._pipeline.homes.items() if node in usable}
        new = [name for name in layout.stages if name not in homes]
        if not new:
            return
        chosen = self._choose(layout, topology, usable=usable, current=homes)
        if isinstance(chosen, Refusal):
            self._note("placement_refused", f"The stages are placed without regard to memory: {chosen.reason}")
            return
        self._pipeline.place({name: chosen[name] for name in new})
        self.mark(chosen[name] for name in new)

    def choose(
        self, layout: Layout, topology: Topology, *, usable: Collection[str], node_of: Mapping[str, str]
    ) -> tuple[str, ...] | None:
        """The node of each stage of a layout to come; None: the allocator finds no room.

        Args:
            usable: nodes where stages may stand.
            node_of: of the stages that run.
        """
        chosen = self._choose(layout, topology, usable=usable, current=node_of)
        return None if isinstance(chosen, Refusal) else tuple(chosen[name] for name in layout.stages)

    def mark(self, nodes: Iterable[str]) -> None:
        """Stages start on these nodes now: one more for each time that a node is named."""
        nodes = list(nodes)
        if nodes:
            self._placements.mark(self._pipeline.topology(), nodes, at=time.monotonic())

    def in_order(self, topology: Topology) -> Topology:
        """The same with devices of nodes where nothing starts first."""
        busy = self._placements.congestion(topology, at=time.monotonic())
        return msgspec.structs.replace(
            topology, devices=tuple(sorted(topology.devices, key=lambda device: busy[device.node]))
        )

    def _choose(
        self, layout: Layout, topology: Topology, *, usable: Collection[str], current: Mapping[str, str]
    ) -> dict[str, str] | Refusal:
        topology = mark_draining(topology, {node.name for node in topology.nodes}.difference(usable))
        current = {name: node for name, node in current.items() if name in layout.stages}
        chosen = choose_nodes(
            self._demands(layout),
            self._with_room(topology, ours=set(current.values())),
            at=time.monotonic(),
            current=current,
            num_others=self._placements.num_stages_of_others(self._key),
            hostings=self._placements.hostings(topology),
            graph=self._placements.graph(),
            home=self._pipeline.router_node,
        )
        return chosen if isinstance(chosen, Refusal) else dict(zip(layout.stages, chosen, strict=True))

    def _demands(self, layout: Layout) -> list[StageDemand]:
        """Weights, the process, and KV for one sequence of the greatest length."""
        setup, budget = self._pipeline.setup, self._pipeline.budget
        num_blocks = min(budget.max_blocks, -(-setup.max_model_len // setup.block_size))
        first, last = layout.stages[0], layout.stages[-1]
        return [
            StageDemand(
                name=part.stage,
                model=setup.model_path,
                memory_bytes=self._weights.of(part.layers, is_first=part.stage == first, is_last=part.stage == last)
                + num_blocks * budget.block_bytes * len(part.layers)
                + (self._overhead_bytes or _PROCESS_BYTES),
            )
            for part in layout.slices
        ]

    def _with_room(self, topology: Topology, *, ours: Collection[str]) -> Topology:
        """The same with what this pipeline may take as free: its budget where it has stages, elsewhere its share among
        the pipelines there."""
        budget, budgets = self._pipeline.budget, dict(self._pipeline.budgets)
        num_sharing = self._placements.num_pipelines_of_others(self._key)

        def room(device: Device) -> int:
            if device.node in ours and device.domain in budgets:
                return budgets[device.domain]
            total = budget.total_bytes(device.domain, device=device.kind, free_bytes=device.free_bytes)
            if device.free_bytes:  # else it is not known
                total = min(total, device.free_bytes)
            return total // (1 + num_sharing.get(device.node, 0))

        return msgspec.structs.replace(
            topology,
            devices=tuple(
                msgspec.structs.replace(device, free_bytes=free, total_bytes=max(device.total_bytes, free))
                for device in topology.devices
                for free in (room(device),)
            ),
        )
