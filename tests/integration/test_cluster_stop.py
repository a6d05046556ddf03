"""The end of ``flexpipe serve``: nothing is left, and another Ray on the machine has not noticed anything."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from served import Served, nothing_left_of

pytestmark = [pytest.mark.cluster, pytest.mark.slow]
RAY_FOLDER = Path("/tmp/ray")


def test_ctrl_c_leaves_nothing_and_another_ray_works_on(served: Served, other_ray: Any) -> None:
    @other_ray.remote
    def pid() -> int:
        return os.getpid()

    assert served.complete("Once upon a time", num_tokens=5)
    # Other programs find a Ray on this machine by the links in its folder; none of them leads to ours.
    assert RAY_FOLDER.is_dir()
    session = served.folders()[0].resolve()
    assert not [link for link in RAY_FOLDER.iterdir() if link.resolve().is_relative_to(session)]
    with nothing_left_of(served):
        assert served.stop(signal.SIGINT, whole_group=True) == 0
    log = served.log.read_text()
    assert log.rstrip().endswith("stopped")
    assert "Traceback" not in log
    assert other_ray.get(pid.remote(), timeout=60) > 0
