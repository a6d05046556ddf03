"""What every host's handle of a stage must do."""

from __future__ import annotations

from dataclasses import replace

import pytest

from flexpipe_serve.errors import CopyError, EngineUnavailableError
from flexpipe_serve.kv.segment import KVMemoryError
from flexpipe_serve.pipeline.stage_types import Assignment, Incoming, StageHost, StageSetup

_TOO_MANY = 10**9


def check_calls(host: StageHost, setup: StageSetup) -> None:
    """Calls that take long hold up no others, and errors keep their type on the way."""
    stage = host.launch(replace(setup, max_blocks=_TOO_MANY))
    try:
        nowhere = stage.report().result(60).endpoint
        assignment = Assignment(
            epoch=1,
            start=0,
            stop=4,
            is_first=True,
            is_last=True,
            next=nowhere,
            incoming=(Incoming(source="nobody", endpoint=nowhere, layers=(0, 1)),),
        )
        assert stage.prepare(assignment, num_blocks=8, fresh=True).result(60).num_blocks == 8
        waiting = [stage.wait_copied(1, through_step=step, timeout_s=240) for step in range(8)]
        assert stage.report().result(90).kv_bytes > 0
        with pytest.raises(KVMemoryError, match=f"cannot grow from 8 to {_TOO_MANY} blocks"):
            stage.resize_kv(_TOO_MANY).result(90)
        stage.resize_kv(16).result(90)
        report = stage.release(1).result(90)
        assert (report.weights_bytes, report.kv_bytes, report.num_blocks) == (0, 0, 16)
        for future in waiting:
            with pytest.raises(CopyError, match="released"):
                future.result(90)
        with pytest.raises(EngineUnavailableError, match="epoch 1 was released"):
            stage.prepare(assignment, num_blocks=8, fresh=False).result(90)
        watch = stage.watch()
    finally:
        stage.stop()
    watch.exception(20)  # over, whether with an error or not
