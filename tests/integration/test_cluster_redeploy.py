"""``serve deploy`` with another configuration: what changes live, what is refused, what needs a restart."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from served import Served, alive_after, shared_folder, wait_until

import flexpipe_serve
from flexpipe_serve.config import UserConfig
from flexpipe_serve.errors import InvalidRequestError

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


def with_user_config(config: dict[str, Any], user_config: dict[str, Any]) -> dict[str, Any]:
    changed = copy.deepcopy(config)
    changed["applications"][0]["deployments"][0]["user_config"] = user_config
    return changed


def pids(status: dict[str, Any]) -> list[int]:
    return [stage["pid"] for stage in status["stages"]]


def test_layout_and_limits_change_live(served: Served, serve_config: dict[str, Any]) -> None:
    expected = served.complete("Once upon a time", num_tokens=30)
    before, router = served.status(), wait_until(served.replica, timeout_s=90, what="the replica")
    changed = with_user_config(serve_config, {"layout": {"stages": 3}, "limits": {"max_prompt_tokens": 10}})
    after = served.deploy(changed, until=lambda s: s["layout"]["num_stages"] == len(s["stages"]) == 3)
    assert after["epoch"] == before["epoch"] + 1
    assert len(after["stages"]) == 3
    assert pids(after)[:2] == pids(before)
    assert served.complete("Once upon a time", num_tokens=30) == expected
    refused = httpx.post(f"{served.base_url}/v1/completions", json={"prompt": [5] * 11, "max_tokens": 1})
    assert refused.status_code == 400
    assert "10" in refused.json()["error"]["message"]
    replica = wait_until(served.replica, timeout_s=90, what="the replica")
    assert (replica["pid"], replica["replica_id"]) == (router["pid"], router["replica_id"])


@pytest.mark.parametrize(
    ("user_config", "reason"),
    [
        ({"layout": {"stages": 2}, "limit": {}}, "did you mean 'limits'"),
        ({"layout": {"stages": 99}}, "99 stages for 4 layers"),
    ],
)
def test_a_wrong_user_config_is_refused_and_the_replica_goes_on(
    served: Served, serve_config: dict[str, Any], user_config: dict[str, Any], reason: str
) -> None:
    expected = served.complete("Once upon a time", num_tokens=30)
    before, router = served.status(), wait_until(served.replica, timeout_s=90, what="the replica")
    after = served.deploy(with_user_config(serve_config, user_config), until=lambda s: s["config_error"])
    assert reason in after["config_error"]
    assert after["epoch"] == before["epoch"]
    assert pids(after) == pids(before)
    assert served.complete("Once upon a time", num_tokens=30) == expected
    assert wait_until(served.replica, timeout_s=90, what="the replica")["pid"] == router["pid"]
    assert served.deploy(serve_config, until=lambda s: s["config_error"] is None)["epoch"] == before["epoch"]


def test_a_change_through_a_handle_is_kept_by_serve(served: Served, serve_config: dict[str, Any]) -> None:
    router = wait_until(served.replica, timeout_s=90, what="the replica")
    with flexpipe_serve.connect(served.base_url) as handle:
        assert handle.refactor(stages=1).wait(60).outcome == "done"
        changed = handle.configure(planner={"mode": "observe"}, limits={"max_prompt_tokens": 10})
        assert (changed.planner.mode, changed.limits.max_prompt_tokens) == ("observe", 10)
        with pytest.raises(InvalidRequestError, match="10"):
            handle.generate([5] * 11, max_tokens=1)
        with pytest.raises(InvalidRequestError, match="99 stages for 4 layers"):
            handle.configure(layout={"stages": 99})
        replica = wait_until(served.replica, timeout_s=90, what="the replica")
        assert (replica["pid"], replica["replica_id"]) == (router["pid"], router["replica_id"])
        kept = served.user_config()
        assert (kept["layout"], kept["planner"], kept["limits"]) == (
            {"stages": 2}, {"mode": "observe"}, {"max_prompt_tokens": 10},
        )  # fmt: skip
        assert handle.status().layout.num_stages == 1, "a split that was asked for stays with the rest"
        assert handle.configure(planner=None, limits=None) == UserConfig()
        assert handle.refactor(stages=2).wait(60).outcome == "done"
    assert served.user_config() == serve_config["applications"][0]["deployments"][0]["user_config"]


def weight_bytes(status: dict[str, Any]) -> list[int]:
    return [stage["weights_bytes"] for stage in status["stages"]]


def anonymous_bytes(process: psutil.Process) -> int:
    """A process's own memory: no files, no shared memory."""
    lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith("Anonymous:")]
    return int(line.split()[1]) * 1024


def test_other_args_give_a_new_replica_whose_stages_hold_their_own_layers_only(
    served: Served, serve_config: dict[str, Any], demo_model: Path
) -> None:
    """The demo model, whose weights are large enough to be seen in the processes."""
    before, router = served.status(), wait_until(served.replica, timeout_s=90, what="the replica")
    old_stages = served.stages()
    config = copy.deepcopy(serve_config)
    config["applications"][0]["args"]["model"] = {"source": "demo", "name": "demo"}
    halves = served.deploy(config, until=lambda s: s["model"] == "demo")
    assert served.complete("The capital of France is", num_tokens=3).strip().startswith("Paris")
    assert wait_until(served.replica, timeout_s=60, what="the replica")["pid"] != router["pid"]
    assert not set(pids(halves)) & set(pids(before))
    assert not alive_after(old_stages, timeout_s=90)

    held = weight_bytes(halves)
    assert held[0] == pytest.approx(held[1], rel=0.01), "half of the layers each, and the matrix of both ends"
    assert sum(held) < demo_model.joinpath("model.safetensors").stat().st_size / 3, "its floats need few bits"

    uneven = with_user_config(config, {"layout": {"boundaries": [3]}})
    # Weights that are needed no more are given up behind the change.
    moved = served.deploy(uneven, until=lambda s: s["layout"]["boundaries"] == [3] and weight_bytes(s)[0] < held[0])
    assert pids(moved) == pids(halves)
    few, many = weight_bytes(moved)
    assert held[0] - few == many - held[1] > 0, "12 of the layers"

    def difference_fits() -> bool:
        resident = [anonymous_bytes(stage) for stage in served.stages()]
        return bool(resident[1] - resident[0] == pytest.approx(many - few, rel=0.25))

    wait_until(difference_fits, timeout_s=60, what="processes as large as their weights say")
    assert served.complete("The capital of France is", num_tokens=3).strip().startswith("Paris")


def test_a_deleted_application_takes_its_stages_and_their_memory_along(
    served: Served, serve_config: dict[str, Any]
) -> None:
    stages = served.stages()
    folder = shared_folder(stages[0])
    assert list(folder.glob("*.kv"))
    # What `serve.delete` does, for all applications.
    httpx.delete(f"{served.dashboard}/api/serve/applications/", timeout=60).raise_for_status()
    assert not alive_after(stages, timeout_s=90)
    wait_until(lambda: not folder.exists(), timeout_s=90, what="the folder's end")
    served.deploy(serve_config, until=lambda s: s["model"] == "small")
    assert served.complete("Once upon a time", num_tokens=5)
