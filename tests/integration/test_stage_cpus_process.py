"""A stage's process on cores of its own."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

import pytest
from tiny_models import make_checkpoint

from flexpipe_serve.errors import EngineUnavailableError
from flexpipe_serve.pipeline.process_host import ProcessStageHost
from flexpipe_serve.pipeline.stage_types import StageSetup

CORE = max(os.sched_getaffinity(0))


@pytest.fixture
def setup(tmp_path: Path) -> StageSetup:
    make_checkpoint(tmp_path, "llama")
    return StageSetup(
        name="stage-0", domain_key=uuid.uuid4().hex, model_path=str(tmp_path), max_model_len=64, dtype="float32",
        device="cpu", attention="auto", block_size=16, max_blocks=100, num_work_tokens=64, orphan_timeout_s=60,
        linear="plain", cores=(CORE,), cpu_share=0.5,
    )  # fmt: skip


def test_all_threads_of_a_stage_stay_on_its_cores(setup: StageSetup) -> None:
    stage = ProcessStageHost().launch(setup)
    try:
        report = stage.report().result(60)
        threads = [int(path.name) for path in Path(f"/proc/{report.pid}/task").iterdir()]
        assert len(threads) > 2
        assert {core for thread in threads for core in os.sched_getaffinity(thread)} == {CORE}
        assert report.compute == f"{report.node}/cores {CORE}"
        assert report.speed == 0.5 / len(os.sched_getaffinity(0))
    finally:
        stage.stop()


def test_a_stage_on_a_core_that_is_not_there_does_not_start(setup: StageSetup) -> None:
    stage = ProcessStageHost().launch(StageSetup(**{**vars(setup), "cores": (4095,)}))
    with pytest.raises(EngineUnavailableError):
        stage.report().result(60)
    stage.stop()
