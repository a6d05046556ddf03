"""Layouts that the configuration asks for: live refactorings, one after the other, the latest wish counts."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from engines import LinearHost, even_layout, generate_all, running_engine
from leaks import check_idle, settle
from refactor_faults import before_command

from flexpipe_serve.engine.engine import Engine
from flexpipe_serve.engine.sampling_params import SamplingParams
from flexpipe_serve.errors import ConfigError
from flexpipe_serve.pipeline.local_host import LocalStageHost
from flexpipe_serve.refactor.commands import Prepare, Switch
from flexpipe_serve.refactor.record import Outcome

GREEDY = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)
PROMPTS = [[5, 6, 7], [8, 9, 10, 11]]
NUM_LAYERS = 6


@pytest.fixture
def host() -> LocalStageHost:
    return LinearHost("plain")


@pytest.fixture
def engine(six_layers: Path, host: LocalStageHost) -> Iterator[Engine]:
    with running_engine(six_layers, num_stages=2, host=host) as engine:
        yield engine


def num_stages(engine: Engine) -> int:
    return int(engine.status().layout.num_stages)


def test_a_layout_that_does_not_fit_is_refused_and_the_former_one_serves_on(engine: Engine) -> None:
    expected = generate_all(engine, PROMPTS, GREEDY)
    budgets = engine._pipeline.budgets
    held = sum(r.weights_bytes + r.overhead_bytes for r in engine._pipeline.reports().values())
    budgets["local"] = held + (1 << 20)  # no room for a third stage
    with pytest.raises(ConfigError, match=r"Only 0 KV blocks would be left.*domain 'local' has"):
        engine.set_layout(even_layout(NUM_LAYERS, 3)).result(60)
    assert engine.status().state == "serving"
    assert engine.refactorings() == []
    assert num_stages(engine) == 2
    assert generate_all(engine, PROMPTS, GREEDY) == expected


def test_a_layout_that_cannot_be_had_is_refused_once_it_was_tried(
    engine: Engine, host: LocalStageHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = generate_all(engine, PROMPTS, GREEDY)

    def launch(*args: object, **options: object) -> None:
        raise OSError("no room on any node")

    with monkeypatch.context() as patch:
        patch.setattr(host, "launch", launch)
        with pytest.raises(ConfigError, match=r"could not be changed.*no room on any node"):
            engine.set_layout(even_layout(NUM_LAYERS, 3)).result(60)
    assert [r.outcome for r in engine.refactorings()] == [Outcome.ABORTED]
    assert generate_all(engine, PROMPTS, GREEDY) == expected
    engine.set_layout(even_layout(NUM_LAYERS, 3)).result(60)
    assert num_stages(engine) == 3
    check_idle(engine, host)


def test_a_stage_lost_before_a_change_of_the_layout_only_delays_it(engine: Engine, host: LocalStageHost) -> None:
    expected = generate_all(engine, PROMPTS, GREEDY)
    lost = threading.Event()
    engine._control.submit(lost.wait)
    change = engine.set_layout(even_layout(NUM_LAYERS, 4))
    host._alive["stage-1"].stop()
    lost.set()
    change.result(60)
    settle(engine)
    assert engine.status().state == "serving"
    assert num_stages(engine) == 4
    assert generate_all(engine, PROMPTS, GREEDY) == expected
    check_idle(engine, host)


def test_a_stage_lost_in_the_middle_leaves_what_was_asked_for(engine: Engine, host: LocalStageHost) -> None:
    expected = generate_all(engine, PROMPTS, GREEDY)
    with before_command(Switch, lambda: host._alive["stage-1"].stop()):
        engine.set_layout(even_layout(NUM_LAYERS, 4)).result(60)
    assert [r.outcome for r in engine.refactorings()] == [Outcome.RECOVERED]
    assert num_stages(engine) == 4
    assert generate_all(engine, PROMPTS, GREEDY) == expected
    check_idle(engine, host)


def test_the_latest_wish_counts(engine: Engine, host: LocalStageHost) -> None:
    """One runs, one waits for it, and one comes instead of that which waits."""
    changes = []

    def wish() -> None:
        changes.extend(engine.set_layout(even_layout(NUM_LAYERS, count)) for count in (4, 1))

    with before_command(Prepare, wish), pytest.raises(ConfigError, match="another layout was asked for meanwhile"):
        engine.set_layout(even_layout(NUM_LAYERS, 3)).result(60)
    overtaken, last = changes
    with pytest.raises(ConfigError, match="another layout was asked for meanwhile"):
        overtaken.result(60)
    last.result(60)
    assert num_stages(engine) == 1
    assert [len(r.plan.new) for r in engine.refactorings()] == [3, 1]
    check_idle(engine, host)


def test_the_layout_in_force_is_not_brought_up_again(engine: Engine) -> None:
    engine.set_layout(even_layout(NUM_LAYERS, 2)).result(60)
    assert engine.status().epoch == 1


def test_warm_stages_are_taken_first(engine: Engine, host: LocalStageHost) -> None:
    engine.set_refactor_limits(max_bytes_per_s=1e9, num_warm_stages=1)
    settle(engine)
    engine._refactorings.fill_pool()
    check_idle(engine, host, num_warm=1)
    warm = host._alive["stage-2"]
    engine.set_layout(even_layout(NUM_LAYERS, 3)).result(60)
    assert host._alive["stage-2"] is warm
    check_idle(engine, host, num_warm=1)
    engine.set_layout(even_layout(NUM_LAYERS, 1)).result(60)
    check_idle(engine, host, num_warm=1)
    engine.set_refactor_limits(max_bytes_per_s=1e9, num_warm_stages=0)
    check_idle(engine, host)
