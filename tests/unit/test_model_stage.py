"""What a stage holds, and that layers come and go in a live one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import CPU, Pipeline, make_checkpoint, make_pipeline, reference_logits
from transformers import PreTrainedModel

from flexpipe_serve.errors import ConfigError, UnsupportedModelError
from flexpipe_serve.kernels.linear import available_kinds
from flexpipe_serve.kernels.torch_attention import TorchAttention
from flexpipe_serve.model.checkpoint import Checkpoint
from flexpipe_serve.model.source import load_spec
from flexpipe_serve.model.stage_model import StageModel
from flexpipe_serve.model.weight_sizes import WeightSizes
from flexpipe_serve.refactor.feasibility import ModelWeights

TOKENS = [9, 4, 77, 23, 5, 61]


def shard(folder: Path) -> None:
    """Replace the checkpoint by one whose every tensor is a file of its own."""
    import json

    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = {name: f"{number:03}.safetensors" for number, name in enumerate(tensors)}
    for name, file in names.items():
        save_file({name: tensors[name]}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


@pytest.fixture(scope="module", params=["llama", "llama-tied", "qwen3_moe"])
def checkpoint(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, PreTrainedModel]:
    folder = tmp_path_factory.mktemp("checkpoint")
    model = make_checkpoint(folder, request.param)
    shard(folder)
    return folder, model


def make_stage(folder: Path, layers: range, *, linear: str = "plain") -> StageModel:
    """Layers with the ends that belong to them."""
    spec = load_spec(folder)
    stage = StageModel(
        spec, device=CPU, dtype=torch.float32, attention=TorchAttention(dtype=torch.float32), linear=linear
    )
    stage.load(layers, embedding=layers.start == 0, head=layers.stop == spec.num_layers)
    return stage


def test_a_stage_holds_its_part(checkpoint: tuple[Path, PreTrainedModel]) -> None:
    folder, _ = checkpoint
    spec = load_spec(folder)
    layers = [spec.layer_bytes(layer, "float32") for layer in range(4)]
    middle = make_stage(folder, range(1, 3))
    assert middle.layers == (1, 2)
    assert middle.sizes.total == layers[1] + layers[2]
    first = make_stage(folder, range(1))
    assert first.sizes.total == layers[0] + spec.embedding_bytes("float32")
    last = make_stage(folder, range(3, 4))
    assert last.sizes.total == layers[3] + spec.head_bytes("float32")


def test_single_stage_shares_a_tied_matrix_unless_packed(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "llama-tied")
    spec = load_spec(tmp_path)
    layers = sum(spec.layer_bytes(layer, "float32") for layer in range(4))
    plain = make_stage(tmp_path, range(4))
    assert plain.sizes.total == layers + spec.head_bytes("float32")
    packed = make_stage(tmp_path, range(4), linear="transposed")
    assert packed.sizes.total == layers + spec.head_bytes("float32") + spec.embedding_bytes("float32")


def test_only_the_shards_of_the_stage_are_read(
    checkpoint: tuple[Path, PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = checkpoint
    read: list[str] = []
    original = Checkpoint.read

    def spy(self: Checkpoint, names: object, **kwargs: object) -> object:
        names = list(names)  # type: ignore[call-overload]
        read.extend(names)
        return original(self, names, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(Checkpoint, "read", spy)
    make_stage(folder, range(2, 3))
    assert read
    assert all(name.startswith("model.layers.2.") for name in read)


def test_loading_takes_one_thread_and_leaves_the_number_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_checkpoint(tmp_path, "llama")
    seen: list[int] = []
    original = Checkpoint.read

    def spy(self: Checkpoint, *args: object, **kwargs: object) -> object:
        seen.append(torch.get_num_threads())
        return original(self, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(Checkpoint, "read", spy)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        make_stage(tmp_path, range(4))
        assert (set(seen), torch.get_num_threads()) == ({1}, 2)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("linear", available_kinds(CPU, torch.float32))
def test_layers_move_between_live_stages(checkpoint: tuple[Path, PreTrainedModel], linear: str) -> None:
    folder, model = checkpoint
    first = make_stage(folder, range(1), linear=linear)
    last = make_stage(folder, range(1, 4), linear=linear)
    spec = load_spec(folder)
    expected = reference_logits(model, TOKENS)
    (before,) = Pipeline(spec, [(first, range(1)), (last, range(1, 4))]).step([(0, TOKENS)])
    torch.testing.assert_close(before, expected, atol=1e-4, rtol=0)

    first.load(range(3))
    assert (first.layers, last.layers) == ((0, 1, 2), (1, 2, 3)), "both epochs can run"
    (old,) = Pipeline(spec, [(first, range(1)), (last, range(1, 4))]).step([(0, TOKENS)])
    (new,) = Pipeline(spec, [(first, range(3)), (last, range(3, 4))]).step([(0, TOKENS)])
    assert torch.equal(old, before)
    assert torch.equal(new, before), "the same layers give the same bits wherever they run"

    last.keep(range(3, 4), head=True)
    assert (first.layers, last.layers) == ((0, 1, 2), (3,))
    (after,) = Pipeline(spec, [(first, range(3)), (last, range(3, 4))]).step([(0, TOKENS)])
    assert torch.equal(after, before)

    first.load(range(4), head=True)
    (alone,) = Pipeline(spec, [(first, range(4))]).step([(0, TOKENS)])
    assert torch.equal(alone, before)

    first.keep(range(1, 2))
    assert (first.layers, first.sizes.embedding, first.sizes.head) == ((1,), 0, 0)
    missing_outputs = 1.3  # a small matrix's last panel is mostly empty
    assert spec.layer_bytes(1, "float32") <= first.sizes.total <= missing_outputs * spec.layer_bytes(1, "float32")


def test_ends_come_in_either_order_and_go_alone(checkpoint: tuple[Path, PreTrainedModel]) -> None:
    folder, _ = checkpoint
    spec = load_spec(folder)
    layers = sum(spec.layer_bytes(layer, "float32") for layer in range(4))
    ends = [{"embedding": True}, {"head": True}]
    whole = make_stage(folder, range(4))
    for order in (ends, ends[::-1]):
        stage = make_stage(folder, range(1, 3))
        stage.load(range(4), **order[0])
        stage.load(range(4), **order[1])
        assert stage.sizes.total == whole.sizes.total
        (logits,) = Pipeline(spec, [(stage, range(4))]).step([(0, TOKENS)])
        assert torch.equal(logits, Pipeline(spec, [(whole, range(4))]).step([(0, TOKENS)])[0])
        stage.keep(range(4), embedding=True)
        assert stage.sizes.total == layers + spec.embedding_bytes("float32")
        stage.load((), head=True)
        stage.keep(range(4), head=True)
        assert stage.sizes.total == layers + spec.head_bytes("float32")


def test_loading_can_be_given_up_between_tensors(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "llama")
    stage = make_stage(tmp_path, range(1))

    def between() -> None:
        if stage.layers == (0, 1):
            raise InterruptedError

    with pytest.raises(InterruptedError):
        stage.load(range(4), between=between)
    assert stage.layers == (0, 1), "whole layers only"


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "llama")
    stage = make_stage(tmp_path, range(1))
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ConfigError, match=r"model\.safetensors is missing or damaged, model\.layers\.1"):
        stage.load(range(2))
    assert stage.layers == (0,)


@pytest.mark.parametrize("name", ["llama", "olmo2"])
@pytest.mark.parametrize("change", ["add", "remove"])
def test_unexpected_layer_weights_are_refused(tmp_path: Path, name: str, change: str) -> None:
    make_checkpoint(tmp_path, name)
    tensors = load_file(tmp_path / "model.safetensors")
    if change == "add":
        tensors["model.layers.2.self_attn.sinks"] = torch.zeros(4)
    else:
        del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UnsupportedModelError, match="sinks" if change == "add" else "up_proj"):
        make_pipeline(tmp_path)


_RESIDENT = """
import re, sys, torch
from pathlib import Path
from flexpipe_serve.kernels.torch_attention import TorchAttention
from flexpipe_serve.model.source import load_spec
from flexpipe_serve.model.stage_model import StageModel
from flexpipe_serve.model.weight_sizes import WeightSizes
from flexpipe_serve.refactor.feasibility import ModelWeights
def resident():
    status = open("/proc/self/status").read()
    return int(re.search(r"VmRSS:\\s+(\\d+)", status)[1]) * 1024
spec = load_spec(Path(sys.argv[1]))
def stage(layers, kind):
    model = StageModel(spec, device=torch.device("cpu"), dtype=torch.float32,
        attention=TorchAttention(dtype=torch.float32), linear=kind)
    model.load(layers)
    return model
kept = []
for kind in sys.argv[2:]:
    warm = stage(range(2, 3), kind)  # what a kind takes once, for its code
    warm.keep(())
    before = resident()
    kept.append(stage(range(2), kind))
    print(kind, resident() - before, kept[-1].sizes.total)
"""


def test_resident_memory_is_the_stages_part(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "llama", hidden_size=640, intermediate_size=2048)
    kinds = available_kinds(CPU, torch.float32)
    command = [sys.executable, "-c", _RESIDENT, str(tmp_path), *kinds]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for kind, line in zip(kinds, output.splitlines(), strict=True):
        grown, held = map(int, line.split()[1:])
        assert held > 40e6
        assert 0.9 * held < grown < 1.1 * held + 4e6, kind


def test_sizes_seen_make_a_models_weights_exact() -> None:
    most = ModelWeights(layers=(10, 10, 10), embedding=50, head=51)
    first = WeightSizes(layers={0: 4, 1: 5}, embedding=20)
    last = WeightSizes(layers={2: 6}, head=21)
    exact = most.seen([first, last])
    assert exact == ModelWeights(layers=(4, 5, 6), embedding=20, head=21)
    assert exact.of((0, 1), is_first=True, is_last=False) == first.total == 29
    alone = WeightSizes(layers={0: 4, 1: 5, 2: 6}, embedding=20, head=21, shared_ends=20)
    assert most.seen([alone]).of(range(3), is_first=True, is_last=True) == alone.total == 36
    assert most.seen([first]).of((2,), is_first=False, is_last=True) == 61, "what nobody holds: at most"
