"""Reading a model folder's facts without torch, and finding the folder."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_models import make_checkpoint

from flexpipe_serve.errors import ConfigError, UnsupportedModelError
from flexpipe_serve.model.source import load_spec, resolve_source


def edit(file: Path, **changes: Any) -> None:
    """Set fields of a JSON file; a field set to ``...`` is removed."""
    content = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_checkpoint(tmp_path, "llama")
    return tmp_path


def test_facts(folder: Path) -> None:
    spec = load_spec(folder)
    assert (spec.num_layers, spec.hidden_size, spec.vocab_size, spec.max_model_len) == (4, 48, 131, 64)
    assert (spec.num_heads, spec.num_kv_heads, spec.head_dim) == (4, 2, 12)
    assert spec.architecture == "LlamaForCausalLM"
    assert not spec.tied_embeddings
    layer = 48 * 48 * 2 + 48 * 24 * 2 + 3 * 48 * 80 + 2 * 48
    assert spec.layer_bytes(0, "float32") == 4 * layer
    assert spec.layer_bytes(3, "bfloat16") == 2 * layer
    assert spec.embedding_bytes("float32") == 131 * 48 * 4
    assert spec.head_bytes("float32") == (131 * 48 + 48) * 4
    assert spec.kv_bytes_per_token("float32") == 2 * 2 * 12 * 4
    assert spec.linear_shapes == ((96, 48), (48, 48), (160, 48), (48, 80))


@pytest.mark.parametrize(
    ("name", "num_kv_heads", "head_dim"),
    [("phi3", 2, 12), ("qwen3", 2, 16), ("llama-own-head-dim", 2, 20), ("llama-multi-query", 1, 12)],
)
def test_geometry_comes_from_the_weights(tmp_path: Path, name: str, num_kv_heads: int, head_dim: int) -> None:
    make_checkpoint(tmp_path, name)
    if name != "phi3":
        edit(tmp_path / "config.json", head_dim=..., num_key_value_heads=...)
    spec = load_spec(tmp_path)
    assert (spec.num_kv_heads, spec.head_dim) == (num_kv_heads, head_dim)


def test_end_of_sequence_ids_of_both_files(folder: Path) -> None:
    edit(folder / "generation_config.json", eos_token_id=[7, 2])
    assert load_spec(folder).eos_token_ids == (2, 7)
    edit(folder / "config.json", eos_token_id=None)
    edit(folder / "generation_config.json", eos_token_id=9)
    assert load_spec(folder).eos_token_ids == (9,)


def test_tied_embeddings_follow_the_weights_where_the_configuration_is_silent(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "llama-tied")
    edit(tmp_path / "config.json", tie_word_embeddings=...)
    assert load_spec(tmp_path).tied_embeddings


@pytest.mark.parametrize("limit", [0, -1, 65])
def test_max_model_len_out_of_range(folder: Path, limit: int) -> None:
    with pytest.raises(ConfigError, match=f"max_model_len is {limit}; this model permits 1 to 64"):
        load_spec(folder, max_model_len=limit)


def test_lower_max_model_len(folder: Path) -> None:
    assert load_spec(folder, max_model_len=10).max_model_len == 10


def test_missing_shard_and_damaged_shard(folder: Path) -> None:
    names = {"model.embed_tokens.weight": "gone.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(ConfigError, match=r"gone\.safetensors is missing"):
        load_spec(folder)
    (folder / "gone.safetensors").write_bytes(b"not safetensors at all")
    with pytest.raises(ConfigError, match="cannot be read as safetensors"):
        load_spec(folder)


def test_weights_in_pickles_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UnsupportedModelError, match=r"only pytorch_model\.bin.*save_pretrained"):
        load_spec(folder)


def test_layers_missing(folder: Path) -> None:
    edit(folder / "config.json", num_hidden_layers=6)
    with pytest.raises(UnsupportedModelError, match=r"lacks weights named model\.layers\.4"):
        load_spec(folder)


@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_damaged_configuration(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=r"config\.json"):
        load_spec(folder)


def test_not_a_model_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        load_spec(tmp_path)


def test_resolve_folder(tmp_path: Path) -> None:
    assert resolve_source(str(tmp_path)) == tmp_path.resolve()


@pytest.mark.parametrize("source", ["/no/such/folder", "./nowhere", "a/b/c"])
def test_resolve_missing_folder_asks_no_hub(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ConfigError, match="there is no such folder"):
        resolve_source(source)


def test_resolve_unreachable_hub_id(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match=r"'nobody/nothing'.*cannot be fetched as a hub id.*'demo'"):
        resolve_source("nobody/nothing")


def test_facts_and_tokenizer_need_no_torch(folder: Path) -> None:
    """The Router imports these; torch would cost it seconds and hundreds of megabytes."""
    program = (
        "import sys; from flexpipe_serve.model import source, tokenizer; "
        f"source.load_spec({str(folder)!r}); print('torch' in sys.modules)"
    )
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "False"
