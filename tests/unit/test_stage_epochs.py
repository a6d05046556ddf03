"""A stage in several epochs at once: real stages in threads, messages written by hand."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from stage_harness import NUM_BLOCKS, Harness, Part, harness, take
from tiny_models import make_checkpoint

from flexpipe_serve.errors import EngineUnavailableError, UnsupportedModelError
from flexpipe_serve.kv.segment import KVMemoryError, SharedSegment
from flexpipe_serve.model.checkpoint import Checkpoint
from flexpipe_serve.pipeline.messages import (
    FailureHeader,
    HiddenHeader,
    PatchAckHeader,
    ResultHeader,
    encode,
)
from flexpipe_serve.pipeline.stage_types import StageReport

PROMPTS = [[9, 4, 77, 23, 5, 61], [3, 17, 99], [40, 41, 42, 43, 44, 45, 46, 47, 48]]
NUM_STEPS = 9
OLD: tuple[Part, ...] = (("stage-0", 0, 2), ("stage-1", 2, 4))
NEW_LAYOUTS: dict[str, tuple[Part, ...]] = {
    "shift right": (("stage-0", 0, 3), ("stage-1", 3, 4)),
    "shift left": (("stage-0", 0, 1), ("stage-1", 1, 4)),
    "split": (("stage-0", 0, 1), ("stage-2", 1, 2), ("stage-1", 2, 3), ("stage-3", 3, 4)),
    "merge to the first": (("stage-0", 0, 4),),
    "merge to the last": (("stage-1", 0, 4),),
    "turn around": (("stage-1", 0, 2), ("stage-0", 2, 4)),
    "all new": (("stage-2", 0, 3), ("stage-3", 3, 4)),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_checkpoint(folder, "llama-tied")
    return folder


@pytest.fixture(scope="module")
def expected(model: Path) -> list[tuple[list[int], list[float]]]:
    """Tokens and log probabilities of the prompts, each decoded alone on a single stage."""
    found = []
    with harness(model) as h:
        h.start(("stage-0", 0, 4))
        for prompt in PROMPTS:
            seq = h.sequence(prompt, num_tokens=32)
            for _ in range(NUM_STEPS):
                h.step(1, [seq])
            found.append((seq.tokens, seq.logprobs))
    return found


@pytest.fixture
def h(model: Path) -> Iterator[Harness]:
    with harness(model) as made:
        yield made


def sequences(h: Harness) -> list:
    return [h.sequence(prompt, num_tokens=32) for prompt in PROMPTS]


def decode(h: Harness, epoch: int, seq, num_steps: int) -> None:
    for _ in range(num_steps):
        h.step(epoch, [seq])


def assert_as_expected(seqs: Sequence, expected: list[tuple[list[int], list[float]]]) -> None:
    assert [(seq.tokens, seq.logprobs) for seq in seqs] == expected, "every bit of every step"


@pytest.mark.parametrize("new", NEW_LAYOUTS.values(), ids=NEW_LAYOUTS.keys())
def test_two_epochs_at_once_give_what_one_gives(h: Harness, expected: list, new: tuple[Part, ...]) -> None:
    """In a shared domain KV moves by being mapped: sequences change the epoch in the middle, one after the other."""
    h.start(*OLD)
    seqs = sequences(h)
    for seq in seqs:
        decode(h, 1, seq, 2)
    h.add(2, *new)
    epochs = [2, 1, 1]
    for at in range(2, NUM_STEPS):
        if at == 5:
            epochs = [2, 2, 1]
        for epoch, seq in zip(epochs, seqs, strict=True):  # all of them in flight together
            h.send(epoch, [seq])
        for _ in seqs:
            header, tokens = h.answer()
            assert isinstance(header, ResultHeader), header
            take([seqs[(header.step - 1) % 3]], header, tokens)
    assert_as_expected(seqs, expected)


def test_a_stage_runs_only_the_layers_of_the_steps_epoch(h: Harness, expected: list) -> None:
    h.start(*OLD)
    h.add(2, *NEW_LAYOUTS["shift right"])
    first, second = h.stages["stage-0"], h.stages["stage-1"]
    assert (first.computer.model.layers, second.computer.model.layers) == ((0, 1, 2), (2, 3))
    seqs = sequences(h)
    for at, seq in enumerate(seqs):
        decode(h, 1 + at % 2, seq, NUM_STEPS)
    assert_as_expected(seqs, expected)


# ---------------------------------------------------------------------- copies of blocks


def test_blocks_move_down_in_the_step_stream(h: Harness, expected: list) -> None:
    """As a shrink does it; in the new epoch a stage copies in its own layers, though others map them too: a chain of
    copies done twice would lose a block."""
    h.start(*OLD)
    seqs = sequences(h)
    for seq in seqs:
        decode(h, 1, seq, 3)
    h.add(2, *NEW_LAYOUTS["turn around"])
    for epoch in (1, 2):
        rest = sorted(block for seq in seqs for block in seq.blocks)
        targets = sorted(set(range(NUM_BLOCKS)) - set(rest))[: len(rest)]
        moves = dict(zip(rest, targets, strict=True))
        a, b = targets[0], targets[1]
        copies = [*moves.items(), (a, 60), (b, a), (60, b), (a, 60), (b, a), (60, b)]  # two exchanges, in order
        number = h.send(epoch, copies=copies)
        header, tokens = h.answer()
        assert (header.step, tokens) == (number, [])
        assert isinstance(header, ResultHeader)
        for seq in seqs:
            seq.blocks = [moves[block] for block in seq.blocks]
        for seq in seqs:
            decode(h, epoch, seq, 3)
    assert_as_expected(seqs, expected)


def test_copies_come_before_the_steps_own_tokens_and_also_where_it_fails(h: Harness, expected: list) -> None:
    h.start(*OLD)
    (seq, *_) = seqs = sequences(h)
    decode(h, 1, seq, 4)
    old = seq.blocks
    seq.blocks = [block for block in range(NUM_BLOCKS) if block not in old][: len(old)]
    h.step(1, [seq], copies=list(zip(old, seq.blocks, strict=True)))
    for corrupt in (False, True):
        old = seq.blocks
        seq.blocks = [block for block in range(NUM_BLOCKS) if block not in old][: len(old)]
        bad = h.sequence([5], num_tokens=4)
        bad.blocks = [NUM_BLOCKS]
        h.send(1, [bad], copies=list(zip(old, seq.blocks, strict=True)), corrupt=corrupt)
        header, _ = h.answer()
        assert isinstance(header, FailureHeader)
        assert header.stage == "stage-0"
        h.step(1, [seq])
    decode(h, 1, seq, NUM_STEPS - 7)
    for other in seqs[1:]:
        decode(h, 1, other, NUM_STEPS)
    assert_as_expected(seqs, expected)


# ---------------------------------------------------------------------- failures


def test_a_step_fails_while_another_epoch_goes_on(h: Harness, expected: list, monkeypatch: pytest.MonkeyPatch) -> None:
    h.start(*OLD)
    h.add(2, *NEW_LAYOUTS["shift left"])
    computer = h.stages["stage-1"].computer
    real = computer.run

    def run(assignment, step, given, **kwargs):
        if assignment.epoch == 2 and step.batch.header.step % 4 == 0:
            raise RuntimeError("poison")
        return real(assignment, step, given, **kwargs)

    monkeypatch.setattr(computer, "run", run)
    seqs = sequences(h)
    others = sequences(h)
    num_failed = 0
    for _ in range(NUM_STEPS):
        for seq, other in zip(seqs, others, strict=True):
            sent = {h.send(1, [seq]): seq, h.send(2, [other]): other}
            for _ in range(2):
                header, tokens = h.answer()
                if isinstance(header, FailureHeader):
                    assert (header.epoch, header.stage, header.message) == (2, "stage-1", "RuntimeError: poison")
                    num_failed += 1
                else:
                    take([sent[header.step]], header, tokens)
    assert num_failed > 3
    assert_as_expected(seqs, expected)


@pytest.mark.parametrize(
    "frames",
    [
        [b"garbage"],
        [b""],
        encode(ResultHeader(epoch=1, step=1, stage_seconds=())),
        encode(PatchAckHeader(epoch=7, target="x", number=3)),
        encode(HiddenHeader(epoch=1, step=1, shape=(1, 48), dtype="float32", stage_seconds=()), b"123"),
        encode(HiddenHeader(epoch=1, step=10**9, shape=(-1, 48), dtype="float32", stage_seconds=()), b""),
        encode(HiddenHeader(epoch=1, step=10**9, shape=(1, 48), dtype="nonsense", stage_seconds=()), b"", b""),
    ],
)
def test_whatever_comes_the_stage_goes_on(h: Harness, expected: list, frames: list) -> None:
    h.start(*OLD)
    seqs = sequences(h)
    h.next_step = 2
    for outlet in h.routes[1].values():
        outlet.send(frames)
    for seq in seqs:
        decode(h, 1, seq, NUM_STEPS)
    assert_as_expected(seqs, expected)


def test_steps_of_unknown_epochs_are_dropped(h: Harness, expected: list) -> None:
    h.start(*OLD)
    seqs = sequences(h)
    h.routes[5] = h.routes[1]
    h.send(5, [seqs[0]])
    for seq in seqs:
        decode(h, 1, seq, NUM_STEPS)
    assert_as_expected(seqs, expected)


# ---------------------------------------------------------------------- weights and KV come and go


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


def test_private_segments_belong_to_their_stage(model: Path) -> None:
    with harness(model, private_kv=True) as h:
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
        assert go_on.wait(20)
        return read(self, layer, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(Checkpoint, "read_layer", slow)
    stage = h.stages["stage-0"]
    assignment = h.assignments(2, NEW_LAYOUTS["merge to the first"])["stage-0"]
    with ThreadPoolExecutor(2) as pool:
        prepared = pool.submit(stage.prepare, assignment, num_blocks=NUM_BLOCKS, fresh=False)
        assert loading.wait(20)
        assert stage.report().stop == 2
        seqs = sequences(h)
        for seq in seqs:
            decode(h, 1, seq, NUM_STEPS)
        released = pool.submit(stage.release, 2)
        while 2 not in stage._released:
            pass
        go_on.set()
        with pytest.raises(EngineUnavailableError, match="epoch 2 was released"):
            prepared.result(20)
        released.result(20)
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
                    future.result(20)
                per_layer = h.stages["stage-0"]._kv.committed_bytes // 2 // num_blocks
                assert [stage.report().kv_bytes for stage in h.stages.values()] == [2 * num_blocks * per_layer] * 2
    assert_as_expected(seqs, expected)
    high = h.sequence([1], num_tokens=4)
    high.blocks = [NUM_BLOCKS]
    h.send(1, [high])
    header, _ = h.answer()
    assert isinstance(header, FailureHeader)
    assert f"block_tables has {NUM_BLOCKS}" in header.message
