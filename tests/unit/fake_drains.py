"""Drains that move no stage: each look at the list takes one stage off the node."""

from __future__ import annotations

import copy

from flexpipe_serve.errors import InvalidRequestError, RefactorRefusedError
from flexpipe_serve.placement.drain import DrainRecord, DrainRequest, DrainState

NODES = ("a" * 56, "b" * 56)


class FakeDrains:
    """The part of an engine that empties nodes: two stages stand on each of the two; the Router on the first.

    Attributes:
        drained_by_ray: a node that cannot be undrained.
    """

    def __init__(self) -> None:
        super().__init__()
        self.drain_requests: list[DrainRequest] = []
        self.drained_by_ray: str | None = None
        self._drain_records: list[DrainRecord] = []

    async def drain(self, request: DrainRequest) -> DrainRecord:
        if request.node not in NODES:
            raise InvalidRequestError(f"There is no node {request.node!r}.", param="node")
        if any(record.node != request.node for record in self._drain_records):
            raise RefactorRefusedError("There is no other node.")
        self.drain_requests.append(request)
        record = DrainRecord(
            node=request.node,
            state=DrainState.DRAINING,
            reason=request.reason,
            message="2 stages stand there.",
            requested_at=1_700_000_000.0,
            deadline_at=1_700_000_000.0 + request.deadline_s,
            holds_router=request.node == NODES[0],
            stages=("stage-0", "stage-1"),
        )
        self._drain_records[:] = [record]
        return copy.deepcopy(record)

    def drains(self) -> list[DrainRecord]:
        shown = copy.deepcopy(self._drain_records)
        for record in self._drain_records:
            record.stages = record.stages[1:]
            record.seconds += 1.5
            if not record.stages:
                record.state, record.message = DrainState.EMPTY, "No stage stands there."
        return shown

    async def undrain(self, node: str) -> DrainRecord | None:
        if node == self.drained_by_ray:
            raise RefactorRefusedError(f"Ray drains node {node!r}.")
        found = [record for record in self._drain_records if record.node == node]
        self._drain_records[:] = [record for record in self._drain_records if record.node != node]
        return found[0] if found else None
