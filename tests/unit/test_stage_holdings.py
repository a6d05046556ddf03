"""Weights and KV of a stage come and go with its epochs: real stages in threads, messages written by hand."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import stage_epoch_cases
import torch
from safetensors.torch import load_file, save_file
from stage_epoch_cases import NEW_LAYOUTS, NUM_STEPS, OLD, PROMPTS, assert_as_expected, decode, sequences
from stage_harness import NUM_BLOCKS, Harness, harness
from tiny_models import make_checkpoint

from flexpipe_serve.errors import EngineUnavailableError, UnsupportedModelError
from flexpipe_serve.kv.segment import KVMemoryError, SharedSegment
from flexpipe_serve.model.checkpoint import Checkpoint
from flexpipe_serve.pipeline.messages import (
    FailureHeader,
)
from flexpipe_serve.pipeline.stage_types import StageReport

expected = stage_epoch_cases.expected
h = stage_epoch_cases.h


def held(h: Harness) -> dict[str, tuple[tuple[int, ...], int, bool, bool]]:
    """Of each stage: layers, KV layers, embedding, head."""
    return {
        name: (
            stage.computer.model.layers,
            len(stage._kv),
            stage.computer.model._embedding is not None,
            stage.computer.model._head is not None,
        )
        for name, stage in h.stages.items()
    }


def footprint(report: StageReport) -> tuple[int, int]:
    return report.weights_bytes, report.kv_bytes


def test_release_drops_exactly_what_nobody_needs(h: Harness, expected: list) -> None:
    h.start(*OLD)
    files = h.segment_files()
    h.add(2, *NEW_LAYOUTS["merge to the last"])
    assert held(h) == {"stage-0": ((0, 1), 2, True, False), "stage-1": ((0, 1, 2, 3), 4, True, True)}
    assert h.segment_files() == files == {f"layer-{layer}.kv" for layer in range(4)}
    seqs = sequences(h)
    decode(h, 2, seqs[0], 4)
    for stage in h.stages.values():
        stage.release(1)
    assert held(h) == {"stage-0": ((), 0, False, False), "stage-1": ((0, 1, 2, 3), 4, True, True)}
    assert h.segment_files() == files
    decode(h, 2, seqs[0], NUM_STEPS - 4)

    h.add(3, *NEW_LAYOUTS["turn around"])
    for stage in h.stages.values():
        stage.release(2)
    assert held(h) == {"stage-0": ((2, 3), 2, False, True), "stage-1": ((0, 1), 2, True, False)}
    for seq in seqs[1:]:
        decode(h, 3, seq, NUM_STEPS)
    assert_as_expected(seqs, expected)
    for stage in h.stages.values():
        report = stage.release(3)
        assert footprint(report) == (0, 0)
        assert (report.start, report.stop, report.epoch) == (0, 0, 3)
    assert h.segment_files() == set()


def test_release_removes_what_a_killed_stage_left(h: Harness) -> None:
    h.start(*OLD)
    left = h.folder.segment_path(9)
    left.write_bytes(b"KV")
    h.stages["stage-0"].release(17)
    assert h.segment_files() == {f"layer-{layer}.kv" for layer in range(4)}


def test_private_segments_belong_to_their_stage(tied_model: Path) -> None:
    with harness(tied_model, private_kv=True) as h:
        h.start(*OLD)
        h.add(2, *NEW_LAYOUTS["merge to the first"])
        first = {f"stage-0.layer-{layer}.kv" for layer in range(4)}
        assert h.segment_files() == first | {"stage-1.layer-2.kv", "stage-1.layer-3.kv"}
        assert h.stages["stage-0"].report().domain != h.stages["stage-1"].report().domain
        for stage in h.stages.values():
            stage.release(1)
        assert h.segment_files() == first


def test_an_aborted_prepare_leaves_everything_as_it_was(h: Harness, expected: list) -> None:
    h.start(*OLD)
    before = held(h), {name: footprint(stage.report()) for name, stage in h.stages.items()}
    seqs = sequences(h)
    for seq in seqs:
        decode(h, 1, seq, 4)
    h.add(2, *NEW_LAYOUTS["turn around"])
    for stage in h.stages.values():
        stage.release(2)
    assert (held(h), {name: footprint(stage.report()) for name, stage in h.stages.items()}) == before
    assert h.stages["stage-0"].report().epoch == 2, "its number is spent"
    with pytest.raises(EngineUnavailableError, match="epoch 2 was released"):
        h.add(2, *NEW_LAYOUTS["turn around"])
    for seq in seqs:
        decode(h, 1, seq, NUM_STEPS - 4)
    assert_as_expected(seqs, expected)


def test_a_prepare_that_cannot_load_a_layer(tmp_path: Path, expected: list) -> None:
    make_checkpoint(tmp_path, "llama-tied")
    with harness(tmp_path) as h:
        h.start(*OLD)
        before = held(h)
        tensors = load_file(tmp_path / "model.safetensors")
        tensors["model.layers.3.mlp.extra"] = torch.zeros(4)
        save_file(tensors, tmp_path / "model.safetensors")
        (stage,) = [h.stages["stage-0"]]
        stage.computer.model._checkpoint = Checkpoint(tmp_path)  # what a stage that starts now would read
        assignment = h.assignments(2, NEW_LAYOUTS["merge to the first"])["stage-0"]
        with pytest.raises(UnsupportedModelError, match="extra"):
            stage.prepare(assignment, num_blocks=NUM_BLOCKS, fresh=False)
        stage.release(2)
        assert held(h) == before
        seqs = sequences(h)
        for seq in seqs:
            decode(h, 1, seq, NUM_STEPS)
        assert_as_expected(seqs, expected)


def test_a_prepare_without_memory_for_its_kv(h: Harness, expected: list, monkeypatch: pytest.MonkeyPatch) -> None:
    h.start(*OLD)
    before, files = held(h), h.segment_files()
    commit = SharedSegment._commit

    def refuse(self: SharedSegment, num_blocks: int, between: Callable[[], None]) -> None:
        if "layer-3" in self.path.name:
            raise KVMemoryError("full")
        commit(self, num_blocks, between)

    monkeypatch.setattr(SharedSegment, "_commit", refuse)
    stage = h.stages["stage-0"]
    assignment = h.assignments(2, NEW_LAYOUTS["merge to the first"])["stage-0"]
    with pytest.raises(KVMemoryError):
        stage.prepare(assignment, num_blocks=NUM_BLOCKS, fresh=False)
    stage.release(2)
    assert (held(h), h.segment_files()) == (before, files)
    with pytest.raises(KVMemoryError):
        h.stages["stage-1"].resize_kv(NUM_BLOCKS + 8)
    assert h.stages["stage-1"].report().num_blocks == NUM_BLOCKS
    seqs = sequences(h)
    for seq in seqs:
        decode(h, 1, seq, NUM_STEPS)
    assert_as_expected(seqs, expected)


def test_release_ends_a_prepare_that_is_loading_and_reports_come_meanwhile(
    h: Harness, expected: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    h.start(*OLD)
    before = held(h)
    loading, go_on = threading.Event(), threading.Event()
    read = Checkpoint.read_layer

    def slow(self: Checkpoint, layer: int, **kwargs: object) -> object:
        loading.set()
        assert go_on.wait(60)
        return read(self, layer, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(Checkpoint, "read_layer", slow)
    stage = h.stages["stage-0"]
    assignment = h.assignments(2, NEW_LAYOUTS["merge to the first"])["stage-0"]
    with ThreadPoolExecutor(2) as pool:
        prepared = pool.submit(stage.prepare, assignment, num_blocks=NUM_BLOCKS, fresh=False)
        assert loading.wait(60)
        assert stage.report().stop == 2
        seqs = sequences(h)
        for seq in seqs:
            decode(h, 1, seq, NUM_STEPS)
        released = pool.submit(stage.release, 2)
        while 2 not in stage._released:
            pass
        go_on.set()
        with pytest.raises(EngineUnavailableError, match="epoch 2 was released"):
            prepared.result(60)
        released.result(60)
    assert held(h) == before
    assert_as_expected(seqs, expected)


def test_a_fresh_start_voids_everything_older(h: Harness, expected: list) -> None:
    """As a new Router does with the stages of one that crashed in the middle of a refactoring."""
    h.start(*OLD)
    h.add(2, *NEW_LAYOUTS["turn around"])
    (seq, *_) = seqs = sequences(h)
    decode(h, 2, seq, 2)
    h.start(*NEW_LAYOUTS["shift left"], epoch=3)
    assert held(h) == {"stage-0": ((0,), 1, True, False), "stage-1": ((1, 2, 3), 3, False, True)}
    h.send(2, [seq])
    h.send(1, [seq])
    seqs[0] = h.sequence(PROMPTS[0], num_tokens=16)
    for seq in seqs:
        decode(h, 3, seq, NUM_STEPS)
    assert_as_expected(seqs, expected)


def test_capacity_changes_while_steps_run(h: Harness, expected: list) -> None:
    h.start(*OLD)
    seqs = sequences(h)
    sizes = iter([NUM_BLOCKS + 16, NUM_BLOCKS + 60, NUM_BLOCKS] * 20)
    with ThreadPoolExecutor(1) as pool:
        for _ in range(NUM_STEPS):
            for seq in seqs:
                num_blocks = next(sizes)
                resized = [pool.submit(stage.resize_kv, num_blocks) for stage in h.stages.values()]
                h.step(1, [seq])
                for future in resized:
                    future.result(60)
                per_layer = h.stages["stage-0"]._kv.committed_bytes // 2 // num_blocks
                assert [stage.report().kv_bytes for stage in h.stages.values()] == [2 * num_blocks * per_layer] * 2
    assert_as_expected(seqs, expected)
    high = h.sequence([1], num_tokens=4)
    high.blocks = [NUM_BLOCKS]
    h.send(1, [high])
    header, _ = h.answer()
    assert isinstance(header, FailureHeader)
    assert f"block_tables has {NUM_BLOCKS}" in header.message
