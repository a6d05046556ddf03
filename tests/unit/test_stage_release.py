"""The KV that a stage gives up at a release goes in pieces, with rests between them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from stage_harness import harness
from tiny_models import make_checkpoint

from flexpipe_serve.pipeline import stage as stage_module


def test_layers_go_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_checkpoint(tmp_path, "llama")
    held: list[tuple[int, ...]] = []
    with harness(tmp_path) as h:
        h.start(("stage-0", 0, 3), ("stage-1", 3, 4))
        h.add(2, ("stage-0", 0, 1), ("stage-1", 1, 4))
        stage = h.stages["stage-0"]

        def gently(work: Callable[[Callable[[], None]], Any], *, folder: Path) -> Any:
            assert folder == stage._folder.path
            return work(lambda: held.append(tuple(stage._kv)))

        monkeypatch.setattr(stage_module, "gently", gently)
        stage.release(1)
        assert held == [(0, 2), (0,)]
        assert stage.computer.model.layers == tuple(stage._kv) == (0,)
