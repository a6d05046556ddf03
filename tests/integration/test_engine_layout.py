"""Layout changes that do not go as planned, over real stages in threads."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from engines import even_layout, generate_all, running_engine

from flexpipe_serve.engine.sampling_params import SamplingParams
from flexpipe_serve.errors import ConfigError
from flexpipe_serve.pipeline.layout import Layout

GREEDY = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)
PROMPTS = [[5, 6, 7], [8, 9, 10, 11]]


def test_a_layout_that_does_not_fit_is_refused_and_the_former_one_comes_back(
    small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_engine(small_model, num_stages=2) as engine:
        expected = generate_all(engine, PROMPTS, GREEDY)
        count_blocks = engine._pipeline._count_blocks

        def count_blocks_of_two(layout: Layout, *args: object) -> int:
            if layout.num_stages > 2:
                raise ConfigError("too small")
            return count_blocks(layout, *args)  # type: ignore[arg-type]

        monkeypatch.setattr(engine._pipeline, "_count_blocks", count_blocks_of_two)
        with pytest.raises(ConfigError, match="too small"):
            engine.set_layout(even_layout(4, 3)).result(60)
        assert engine.status()["state"] == "serving"
        assert engine.status()["layout"]["num_stages"] == 2
        assert generate_all(engine, PROMPTS, GREEDY) == expected


def test_a_stage_lost_while_the_layout_changes_does_not_bring_the_former_layout_back(small_model: Path) -> None:
    with running_engine(small_model, num_stages=2) as engine:
        expected = generate_all(engine, PROMPTS, GREEDY)
        lost = threading.Event()
        engine._control.submit(lost.wait)
        change = engine.set_layout(even_layout(4, 4))
        engine._on_stage_lost("stage-1", "killed")
        lost.set()
        change.result(60)
        engine._control.submit(lambda: None).result(60)  # what followed from the loss is done, too
        assert engine.status()["state"] == "serving"
        assert engine.status()["layout"]["num_stages"] == 4
        assert generate_all(engine, PROMPTS, GREEDY) == expected


def test_the_layout_in_force_is_not_brought_up_again(small_model: Path) -> None:
    with running_engine(small_model, num_stages=2) as engine:
        engine.set_layout(even_layout(4, 2)).result(60)
        assert engine.status()["epoch"] == 1
