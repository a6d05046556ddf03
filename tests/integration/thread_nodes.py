"""Several nodes in one process: stages in threads that stand on nodes of their own, reached by TCP."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import msgspec
from engines import even_layout, make_engine

from flexpipe_serve.config import KVConfig, ModelConfig, ServeArgs
from flexpipe_serve.engine.engine import Engine
from flexpipe_serve.pipeline.channel import CurveKeys
from flexpipe_serve.pipeline.local_host import LocalStage, LocalStageHost
from flexpipe_serve.pipeline.stage import Stage
from flexpipe_serve.pipeline.stage_types import StageHandle, StageSetup
from flexpipe_serve.placement.topology import Device, DeviceKind, Node, Topology

_FREE_BYTES = 64 << 30


class NodesHost(LocalStageHost):
    """Hosts stages on named nodes; those without one go round. The Router stands on the first.

    Attributes:
        nodes: their state; a test changes it.
        free_bytes: of those that have not more than enough.
        kept: what an earlier Router was told to keep empty.
    """

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.node = names[0]
        self.nodes = {name: Node(name=name, address=f"{name}.example") for name in names}
        self.free_bytes: dict[str, int] = {}
        self.kept: dict[str, float] = {}
        self.launched: list[tuple[str, str]] = []

    def launch(self, setup: StageSetup, *, node: str | None = None) -> StageHandle:
        usable = [known.name for known in self.nodes.values() if known.is_usable]
        at = node or usable[int(setup.name.rpartition("-")[2]) % len(usable)]
        assert at in usable, f"{at} takes no stage"
        with self._launching:
            stage = self._alive.get(setup.name)
            if stage is None or stage.is_over:
                self.launched.append((setup.name, at))
                core = Stage(replace(setup, linear="native"), node=at)
                stage = self._alive[setup.name] = LocalStage(core)
            return stage

    def topology(self, *, kind: DeviceKind) -> Topology:
        devices = [
            Device(
                name=name, node=name, kind=kind, compute=name, domain=name,
                total_bytes=_FREE_BYTES, free_bytes=self.free_bytes.get(name, _FREE_BYTES),
            )
            for name, node in self.nodes.items()
            if node.is_alive
        ]  # fmt: skip
        return Topology(nodes=tuple(self.nodes.values()), devices=tuple(devices))

    def read_drained(self) -> dict[str, float]:
        return dict(self.kept)

    def write_drained(self, deadlines: Mapping[str, float], /) -> None:
        self.kept = dict(deadlines)

    def say(self, name: str, **state: object) -> None:
        """Change what is known of a node, such as ``is_draining``."""
        self.nodes[name] = msgspec.structs.replace(self.nodes[name], **state)


@contextlib.contextmanager
def engine_on(
    host: NodesHost, model: Path, *, num_layers: int, num_stages: int, memory_budget: int | None = 64 << 30
) -> Iterator[Engine]:
    """A started engine whose stages stand on the nodes in turn; everything it held is gone afterwards."""
    args = ServeArgs(
        model=ModelConfig(source=str(model)),
        memory_budget=memory_budget,  # type: ignore[arg-type]
        kv=KVConfig(block_size=4, max_tokens=2000),
    )
    engine, _ = make_engine(args, host=host, keys=CurveKeys.generate())
    layout, names = even_layout(num_layers, num_stages), list(host.nodes)
    engine._pipeline.place({name: names[i % len(names)] for i, name in enumerate(layout.stages)})
    engine.start(layout)
    try:
        yield engine
    finally:
        engine.stop()
