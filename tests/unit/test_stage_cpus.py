"""Stages with CPU cores of their own, and emulated slower ones."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time
import uuid
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from stage_harness import Harness, harness
from test_pipeline_stages import SlowHost
from tiny_models import make_checkpoint

from flexpipe_serve.config import ServeArgs, StageCpus, parse
from flexpipe_serve.errors import ConfigError
from flexpipe_serve.pipeline import step_compute
from flexpipe_serve.pipeline.budget import KVBudget
from flexpipe_serve.pipeline.compute import stage_speed
from flexpipe_serve.pipeline.layout import make_layout
from flexpipe_serve.pipeline.pipeline import Pipeline
from flexpipe_serve.pipeline.stage_types import StageSetup, stage_compute
from flexpipe_serve.pipeline.step_compute import StepComputer

CORES = sorted(os.sched_getaffinity(0))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_checkpoint(folder, "llama")
    return folder


def test_configuration() -> None:
    args = parse(ServeArgs, {"stage_cpus": {"stage-0": {"cores": [1, 0, 1]}, "stage-1": {"cores": [2], "share": 0.5}}})
    assert args.stage_cpus == {"stage-0": StageCpus(cores=(0, 1)), "stage-1": StageCpus(cores=(2,), share=0.5)}
    same = parse(ServeArgs, {"stage_cpus": {"a": {"cores": [0, 1]}, "b": {"cores": [1, 0]}}})
    assert same.stage_cpus["a"] == same.stage_cpus["b"]


@pytest.mark.parametrize(
    ("stage_cpus", "reason"),
    [
        ({"a": {"cores": []}}, "at least 1 item"),
        ({"a": {"cores": [-1]}}, "greater than or equal to 0"),
        ({"a": {"cores": [0], "share": 0}}, "greater than 0"),
        ({"a": {"cores": [0], "share": 1.5}}, "less than or equal to 1"),
        ({"a": {"cores": [0], "shares": 1}}, "did you mean 'share'"),
        ({"a": {"cores": [0, 1]}, "b": {"cores": [1, 2]}}, "core 1 is in both"),
    ],
)
def test_wrong_configuration(stage_cpus: dict[str, object], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        parse(ServeArgs, {"stage_cpus": stage_cpus})


_PINNED = """
import os, threading
from flexpipe_serve.pipeline.compute import pin_process

end = threading.Event()
earlier = [threading.Thread(target=end.wait, daemon=True) for _ in range(3)]
for thread in earlier:
    thread.start()
pin_process([{core}])
later = threading.Thread(target=end.wait, daemon=True)
later.start()
threads = [int(name) for name in os.listdir("/proc/self/task")]
assert len(threads) >= 5, threads
print(sorted(set(core for thread in threads for core in os.sched_getaffinity(thread))))
end.set()
"""


def test_pinning_holds_for_all_threads_of_the_process() -> None:
    run = subprocess.run(
        [sys.executable, "-c", _PINNED.format(core=CORES[-1])], capture_output=True, text=True, check=True, timeout=60
    )
    assert run.stdout.strip() == str([CORES[-1]])


def test_pinning_to_a_core_that_is_not_there() -> None:
    run = subprocess.run(
        [sys.executable, "-c", _PINNED.format(core=4095)], capture_output=True, text=True, check=False, timeout=60
    )
    last = run.stderr.strip().splitlines()[-1]
    assert "ConfigError" in last
    assert "core 4095" in last


def test_what_computes_and_how_fast(model: Path) -> None:
    with harness(model) as h:
        shared = h.setup
    own = replace(shared, cores=(0, 2))
    slow = replace(own, cpu_share=0.25)
    assert stage_compute(shared, node="n", device="cpu") == "n/cpu"
    assert stage_compute(own, node="n", device="cpu") == stage_compute(slow, node="n", device="cpu") == "n/cores 0,2"
    assert stage_compute(shared, node="n", device="cuda:1") == "n/cuda:1"
    assert stage_speed(shared) == 1
    assert stage_speed(slow) == 0.25 * stage_speed(own)
    assert stage_speed(own) == 2 / len(CORES)


def test_stages_with_cores_of_their_own_compute_at_the_same_time() -> None:
    class Host(SlowHost):
        def launch(self, setup, *, node=None):  # type: ignore[no-untyped-def]
            stage = super().launch(setup, node=node)
            self.stages[setup.name].come_up()
            return stage

    setup = StageSetup(
        name="", domain_key=uuid.uuid4().hex, model_path="", max_model_len=16, dtype="float32", device="cpu",
        attention="auto", block_size=16, max_blocks=16, num_work_tokens=16, orphan_timeout_s=5.0,
    )  # fmt: skip
    cpus = {"stage-0": StageCpus(cores=(0,)), "stage-1": StageCpus(cores=(1,), share=0.5)}
    host = Host()
    pipeline = Pipeline(
        host,
        setup=setup,
        budget=KVBudget(budget_bytes=None, block_bytes=1, max_blocks=16),
        stage_cpus=cpus,
        on_lost=lambda *_: None,
    )
    try:
        for index in range(4):
            pipeline.launch(f"stage-{index}")
        assert [host.stages[f"stage-{index}"].setup.cores for index in range(4)] == [(0,), (1,), (), ()]
        assert host.stages["stage-1"].setup.cpu_share == 0.5
        assert pipeline.depth(make_layout(num_layers=4, boundaries=[])) == 1
        assert pipeline.depth(make_layout(num_layers=4, boundaries=[2])) == 2
        assert pipeline.depth(make_layout(num_layers=4, boundaries=[1, 2, 3])) == 3  # two of them share the node's
    finally:
        pipeline.stop()


def test_an_emulated_stage_rests_in_proportion_to_its_own_work(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, rests = itertools.count(), []
    fake = SimpleNamespace(
        perf_counter=time.perf_counter, thread_time=lambda: next(clock) * 0.01, sleep=lambda s: rests.append(s)
    )
    monkeypatch.setattr(step_compute, "time", fake)
    tokens = {}
    for share in (1.0, 0.25):
        with harness(model, cpu_share=share) as h:
            h.start(("stage-0", 0, 2), ("stage-1", 2, 4))
            tokens[share] = decode(h, num_steps=5)
        assert rests == pytest.approx([] if share == 1 else [0.03] * 10)
    assert tokens[1.0] == tokens[0.25]


@pytest.mark.parametrize(("cores", "expected"), [((), 3), ((0,), 1), ((0, 1), 2)])
def test_a_pinned_stage_computes_with_a_thread_for_each_of_its_cores(
    model: Path, monkeypatch: pytest.MonkeyPatch, cores: tuple[int, ...], expected: int
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 0)
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    with harness(model, cores=cores) as h:
        computer = StepComputer(h.setup)
        asked.clear()
        computer._set_num_threads(3)
    assert asked == [expected]


def decode(h: Harness, *, num_steps: int) -> list[int]:
    """Tokens of one sequence."""
    seq = h.sequence([9, 4, 77, 23], num_tokens=32)
    for _ in range(num_steps):
        h.step(1, [seq])
    return list(seq.tokens)
