"""Stages in threads and in processes, through their handles."""

from __future__ import annotations

import os
import signal
import uuid
from pathlib import Path

import pytest
from stage_calls import check_calls
from tiny_models import make_checkpoint

from flexpipe_serve.errors import EngineUnavailableError
from flexpipe_serve.kv.domain import DomainFolder
from flexpipe_serve.pipeline.local_host import LocalStageHost
from flexpipe_serve.pipeline.process_host import ProcessStageHost
from flexpipe_serve.pipeline.stage_types import StageHost, StageSetup, folder_key


@pytest.fixture
def setup(tmp_path: Path) -> StageSetup:
    make_checkpoint(tmp_path, "llama")
    return StageSetup(
        name="any name: 7",
        domain_key=uuid.uuid4().hex,
        model_path=str(tmp_path),
        max_model_len=64,
        dtype="float32",
        device="cpu",
        attention="torch",
        block_size=16,
        max_blocks=100,
        num_work_tokens=64,
        orphan_timeout_s=60,
        linear="plain",
    )


@pytest.mark.parametrize("host", [LocalStageHost(), ProcessStageHost()], ids=["thread", "process"])
def test_long_calls_do_not_hold_up_others_and_errors_keep_their_type(host: StageHost, setup: StageSetup) -> None:
    check_calls(host, setup)
    with DomainFolder(folder_key(setup.domain_key, host.node)) as folder:  # made anew: nobody holds it
        assert [path.name for path in folder.path.iterdir()] == ["lock"]


def test_calls_to_a_killed_process_fail(setup: StageSetup) -> None:
    stage = ProcessStageHost().launch(setup)
    pid = stage.report().result(60).pid
    os.kill(pid, signal.SIGSTOP)
    pending = stage.report()
    os.kill(pid, signal.SIGKILL)
    for future in (pending, stage.watch(), stage.report()):
        with pytest.raises(EngineUnavailableError):
            future.result(90)
    stage.stop()
