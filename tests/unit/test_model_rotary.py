"""Our unscaled rotary embedding against transformers' module, and that fused models start without transformers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import CPU, make_checkpoint
from transformers import AutoConfig, AutoModelForCausalLM

from flexpipe_serve.errors import ConfigError
from flexpipe_serve.model.rotary import DefaultRotary
from flexpipe_serve.model.source import load_spec
from flexpipe_serve.model.support import FAMILIES

POSITIONS = torch.tensor([[0, 1, 2, 3, 17, 63, 64, 1000, 4095, 8191, 32767, 131071]])

ROPES: dict[str, tuple[str, dict[str, Any]]] = {
    "as saved": ("llama", {}),
    "theta of the old form": ("llama", {"rope_parameters": None, "rope_theta": 500000.0}),
    "whole theta": ("llama", {"rope_parameters": {"rope_theta": 8000001, "rope_type": "default"}}),
    "silent": ("llama", {"rope_parameters": None}),
    "type of the old form": (
        "llama",
        {"rope_parameters": None, "rope_theta": 1e6, "rope_scaling": {"type": "default"}},
    ),
    "both forms": ("llama", {"rope_parameters": {"rope_theta": 5.0}, "rope_scaling": {"rope_theta": 7000.0}}),
    "inner theta first": ("llama", {"rope_parameters": {"rope_theta": 70.0}, "rope_theta": 5.0}),
    "factor that does not count": ("llama", {"partial_rotary_factor": 0.5}),
    "own head dim": ("llama-own-head-dim", {}),
    "mistral": ("mistral", {"rope_parameters": None, "rope_theta": 1e6}),
    "qwen2": ("qwen2", {"rope_parameters": None, "rope_theta": 1e6}),
    "qwen3": ("qwen3", {"rope_parameters": None, "rope_theta": 1e6}),
    "phi3": ("phi3", {}),
    "partial": ("phi3-partial-rotary", {}),
    "partial of the old form": ("phi3", {"rope_parameters": None, "partial_rotary_factor": 0.5}),
}


def edit_config(folder: Path, changes: dict[str, Any]) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(("name", "changes"), ROPES.values(), ids=ROPES)
def test_bits_of_transformers_own_module(tmp_path: Path, name: str, changes: dict[str, Any]) -> None:
    make_checkpoint(tmp_path, name, hidden_size=64)
    edit_config(tmp_path, changes)
    theirs = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path)).model.rotary_emb
    rope = load_spec(tmp_path).default_rope
    assert rope is not None
    ours = DefaultRotary(rope, device=CPU)
    assert torch.equal(ours.inv_freq, theirs.inv_freq)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.empty(1, dtype=dtype)
        for our, their in zip(ours(x, POSITIONS), theirs(x, POSITIONS), strict=True):
            assert our.dtype == dtype
            assert torch.equal(our, their)


@pytest.mark.parametrize("name", ["llama3-rope", "llama-linear-rope", "llama-yarn-rope", "olmo2", "llama-gelu"])
def test_others_are_left_to_transformers(tmp_path: Path, name: str) -> None:
    make_checkpoint(tmp_path, name)
    assert load_spec(tmp_path).default_rope is None


@pytest.mark.parametrize("field", ["rope_theta", "rms_norm_eps"])
@pytest.mark.parametrize("value", ["10000", 0, None])
def test_nonsense_is_refused(tmp_path: Path, field: str, value: object) -> None:
    make_checkpoint(tmp_path, "llama")
    edit_config(tmp_path, {"rope_parameters": None, field: value})
    with pytest.raises(ConfigError, match=f"{field} = {value!r}; it must be a positive number"):
        load_spec(tmp_path)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_default_norm_eps_is_that_of_transformers(model_type: str) -> None:
    assert FAMILIES[model_type].default_norm_eps == AutoConfig.for_model(model_type).rms_norm_eps


_STAGE = """
import sys
from pathlib import Path
import torch
import flexpipe_serve.pipeline.stage
from flexpipe_serve.kernels.torch_attention import TorchAttention
from flexpipe_serve.model.source import load_spec
from flexpipe_serve.model.stage_model import StageModel
spec = load_spec(Path(sys.argv[1]))
stage = StageModel(spec, device=torch.device("cpu"), dtype=torch.float32,
    attention=TorchAttention(dtype=torch.float32), linear="plain")
stage.load(range(spec.num_layers), embedding=True, head=True)
print([name for name in ("transformers", "accelerate", "torch._dynamo") if name in sys.modules])
"""


def test_fused_stage_starts_without_transformers(tmp_path: Path) -> None:
    """It would cost every stage seconds of CPU time when it starts."""
    make_checkpoint(tmp_path, "llama")
    output = subprocess.run([sys.executable, "-c", _STAGE, str(tmp_path)], capture_output=True, text=True, check=True)
    assert output.stdout.strip() == "[]"
