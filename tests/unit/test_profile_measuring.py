"""Measuring on tiny models: every step is one that a stage takes, and nothing stays behind."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_models import make_checkpoint

from flexpipe_serve.errors import ConfigError
from flexpipe_serve.model.profile_steps import decodes, shape_of
from flexpipe_serve.model.profiling import (
    OtherWork,
    Probe,
    ProbedStage,
    make_probes,
    make_setup,
    measure_alternately,
    num_held_layers,
    profile_model,
)
from flexpipe_serve.model.source import ModelSpec, load_spec


def spec_of(folder: Path, name: str = "llama", **changes: object) -> ModelSpec:
    make_checkpoint(folder, name, **changes)
    return load_spec(folder)


@pytest.mark.parametrize("num_layers", [4, 1])
def test_all_steps_run_on_a_model_that_permits_short_sequences_only(tmp_path: Path, num_layers: int) -> None:
    spec = spec_of(tmp_path, num_hidden_layers=num_layers)
    assert spec.max_model_len == 64
    with ProbedStage(spec, make_setup(spec, dtype="float32", device="cpu"), num_threads=1) as stage:
        probes, held_out = make_probes(spec, num_layers=stage.num_layers)
        for probe in (*probes, *held_out):
            assert 0 < stage.run(probe) < math.inf
            # Or the fit would look for the wrong parts in it.
            assert probe not in held_out or probe.is_first == (probe.start == 0)
            assert probe not in held_out or probe.is_last == (probe.stop == num_layers)
        from_disk, from_cache = stage.measure_loading()
        assert from_disk > 0
        assert from_cache is not None
        assert from_cache > 0
        assert stage.folder.is_dir()
    assert not stage.folder.exists()


def test_probes_reach_the_largest_steps_of_the_scheduler(tmp_path: Path) -> None:
    probes, held_out = make_probes(replace(spec_of(tmp_path), max_model_len=8192), num_layers=4)
    assert max(shape_of(probe.rows).num_tokens for probe in probes) == 512
    assert max(shape_of(probe.rows).num_samples for probe in probes if probe.is_last) == 64
    assert not set(probes) & set(held_out)
    assert {(probe.start, probe.stop) for probe in held_out} == {(0, 4), (0, 2), (2, 4)}


def test_layers_of_several_kinds_are_told_apart(tmp_path: Path) -> None:
    # Layer 1 is dense; the others have experts.
    spec = spec_of(tmp_path, "qwen2_moe", mlp_only_layers=[1], intermediate_size=2048)
    assert len(set(spec.layer_elements)) == 2
    with ProbedStage(spec, make_setup(spec, dtype="float32", device="cpu"), num_threads=1) as stage:
        scale = stage.measure_kinds()
    assert scale[0] == scale[2] == scale[3] == 1.0
    assert scale[1] > 0
    assert scale[1] != 1.0


def test_no_more_layers_are_held_than_needed(tmp_path: Path) -> None:
    spec = spec_of(tmp_path)
    of_size = {layers: replace(spec, num_layers=8, layer_elements=(layers << 20,) * 8) for layers in (1, 200, 2000)}
    assert [num_held_layers(each, "float32") for each in of_size.values()] == [8, 2, 2]
    assert num_held_layers(of_size[200], "bfloat16") == 5


class _FakeStage:
    """Takes its time from a list, by probe."""

    def __init__(self, seconds: dict[Probe, list[float]]) -> None:
        self.order: list[Probe] = []
        self._seconds = {probe: iter(values) for probe, values in seconds.items()}

    def run(self, probe: Probe) -> float:
        self.order.append(probe)
        return next(self._seconds[probe])


def test_repeats_take_turns_and_disturbed_ones_do_not_count() -> None:
    short, long = (Probe(rows=decodes(num, context=16), start=0, stop=1) for num in (1, 64))
    disturbed = [0.05, 0.2, 0.05, 0.09, 0.05]
    stage = _FakeStage({short: [9.0, *disturbed * 20], long: [9.0, *[0.5] * 50]})
    shares: list[float] = []
    seconds = measure_alternately(stage, [short, long], on_progress=shares.append)  # type: ignore[arg-type]
    assert seconds[short] == pytest.approx(0.05)
    assert seconds[long] == pytest.approx(0.5)
    assert stage.order.count(long) == 6  # warm-up, and the fewest repeats
    assert set(stage.order[2:4]) == {short, long}
    assert shares == sorted(shares)


def test_other_work_is_a_share_of_the_machine() -> None:
    others = OtherWork()
    sum(range(200_000))
    assert 0.0 <= others.share() <= 1.0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no CUDA device"):
        profile_model(tmp_path, dtype="float32", device="cuda", num_threads=1)
