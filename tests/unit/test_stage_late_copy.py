"""The word to copy comes with the steps, the release of an abort by another way: it may be the first."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from stage_harness import harness
from tiny_models import make_checkpoint

from flexpipe_serve.pipeline.messages import CopyHeader, encode


def test_a_copy_for_a_released_epoch_does_not_begin(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "llama-tied")
    with harness(tmp_path, private_kv=True) as h:
        h.start(("stage-0", 0, 2), ("stage-1", 2, 4))
        h.add(2, ("stage-0", 0, 1), ("stage-1", 1, 4), stage_1=[("stage-0", [1])])
        for stage in h.stages.values():
            stage.release(2)
        target = h.endpoint("stage-1")
        header = CopyHeader(
            epoch=2, old_epoch=1, layers=(1,), target="stage-1", node=target.node, ipc=target.ipc, tcp=target.tcp,
            max_bytes_per_s=1e9,
        )  # fmt: skip
        h.routes[1]["stage-0"].send(encode(header, np.arange(4, dtype=np.int32).tobytes()))
        h.step(1, [h.sequence([5, 6, 7], num_tokens=8)])
        h.stages["stage-0"].release(3)  # waits until the copies' thread has done what it was told
        assert h.stages["stage-0"]._copies._giving == {}
