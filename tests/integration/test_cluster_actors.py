"""Stages as Ray actors: found again by name, ended when nobody speaks to them."""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from served import alive_after, shared_folder, wait_until
from stage_calls import check_calls

from flexpipe_serve.pipeline.ray_host import RayStageHost
from flexpipe_serve.pipeline.stage_types import StageSetup

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


@pytest.fixture
def setup(small_model: Path) -> StageSetup:
    return StageSetup(
        name="stage-0",
        domain_key=uuid.uuid4().hex,
        model_path=str(small_model),
        max_model_len=1024,
        dtype="float32",
        device="cpu",
        attention="torch",
        block_size=16,
        max_blocks=100,
        num_work_tokens=64,
        orphan_timeout_s=60,
        linear="plain",
    )


@pytest.fixture
def app(other_ray: Any) -> Iterator[str]:
    """A name of its own for each test; stages that are left go."""
    name = uuid.uuid4().hex
    yield name
    for actor in other_ray.util.list_named_actors(all_namespaces=True):
        if actor["name"].startswith(name):
            other_ray.kill(other_ray.get_actor(actor["name"], namespace=actor["namespace"]))


def test_the_next_router_finds_a_stage_by_name_and_replaces_one_with_another_setup(app: str, setup: StageSetup) -> None:
    first = RayStageHost(app).launch(setup).report().result(60)
    assert RayStageHost(app).launch(setup).report().result(60).pid == first.pid
    old = psutil.Process(first.pid)
    other = dataclasses.replace(setup, block_size=8)
    second = RayStageHost(app).launch(other).report().result(60)
    assert second.setup == other
    assert second.pid != first.pid
    assert not alive_after([old], timeout_s=90)


def test_a_stage_without_a_router_ends_itself_and_leaves_nothing(app: str, setup: StageSetup) -> None:
    stage = RayStageHost(app).launch(dataclasses.replace(setup, orphan_timeout_s=1))
    process = psutil.Process(stage.report().result(60).pid)
    folder = shared_folder(process)
    watch = stage.watch()
    watch.result(90)  # told before the process goes
    wait_until(lambda: not folder.exists(), timeout_s=90, what="the folder's end")
    assert not alive_after([process], timeout_s=90)


def test_long_calls_do_not_hold_up_others_and_errors_keep_their_type(app: str, setup: StageSetup) -> None:
    check_calls(RayStageHost(app), setup)
