"""Small randomly initialised checkpoints of every served model type, and a driver that runs stages on them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from flexpipe_serve.kernels.attention import AttentionBackend, RaggedBatch
from flexpipe_serve.kernels.torch_attention import TorchAttention
from flexpipe_serve.model.source import ModelSpec, load_spec
from flexpipe_serve.model.stage_model import StageModel

CPU = torch.device("cpu")
BLOCK_SIZE = 4
NUM_BLOCKS = 96

_BASE: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
_LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + 0.1 * i for i in range(6)],
    "long_factor": [2.0 + 0.5 * i for i in range(6)],
    "original_max_position_embeddings": 48,
}

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama-tied": {"model_type": "llama", "tie_word_embeddings": True},
    "llama-biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "llama-multi-head": {"model_type": "llama", "num_key_value_heads": 4},
    "llama-multi-query": {"model_type": "llama", "num_key_value_heads": 1},
    "llama-own-head-dim": {"model_type": "llama", "head_dim": 20},
    "llama-gelu": {"model_type": "llama", "hidden_act": "gelu"},
    "llama3-rope": {"model_type": "llama", "rope_parameters": _LLAMA3_ROPE},
    "llama-linear-rope": {
        "model_type": "llama",
        "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
    },
    "llama-yarn-rope": {"model_type": "llama", "rope_parameters": _YARN_ROPE},
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "mistral-long-window": {"model_type": "mistral", "sliding_window": 64},
    "qwen2": {"model_type": "qwen2", "use_sliding_window": False},
    "qwen2-tied": {"model_type": "qwen2", "use_sliding_window": False, "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
    "phi3": {"model_type": "phi3", "sliding_window": None},
    "phi3-partial-rotary": {
        "model_type": "phi3",
        "sliding_window": None,
        "hidden_size": 64,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    },
    "phi3-longrope": {
        "model_type": "phi3",
        "rope_parameters": _LONG_ROPE,
        "max_position_embeddings": 64,
        "original_max_position_embeddings": 48,
    },
    "olmo2": {"model_type": "olmo2"},
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "model_type": "qwen2_moe",
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
    },
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "head_dim": 12,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "norm_topk_prob": True,
    },
}


def make_checkpoint(folder: Path, name: str, *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Save ``CONFIGS[name]`` with random weights to ``folder`` and return transformers' own model of it."""
    fields = {**_BASE, **CONFIGS[name], **changes}
    torch.manual_seed(seed)
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            # Norms and biases start as ones and zeros, which would hide a missing one.
            noise = torch.randn_like(parameter)
            parameter.copy_(1 + 0.2 * noise if parameter.dim() == 1 and "norm" in parameter_name else 0.2 * noise)
    model.save_pretrained(folder)
    # As it will be read by anybody else: initialisation from_config does differs from loading in some details.
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@dataclass
class Pipeline:
    """Stages in one process, with KV that starts as NaN and block ids in no order."""

    spec: ModelSpec
    parts: list[tuple[StageModel, range]]
    """Stages, and which of their layers take part."""
    attention: AttentionBackend = field(default_factory=lambda: TorchAttention(dtype=torch.float32))
    device: torch.device = CPU
    dtype: torch.dtype = torch.float32
    block_size: int = BLOCK_SIZE
    seed: int = 0

    def __post_init__(self) -> None:
        shape = (NUM_BLOCKS, 2, self.block_size, self.spec.num_kv_heads, self.spec.head_dim)
        self._kv = {
            layer: torch.full(shape, float("nan"), dtype=self.dtype, device=self.device)
            for layer in range(self.spec.num_layers)
        }
        self._free = [int(block) for block in np.random.default_rng(self.seed).permutation(NUM_BLOCKS)]
        self._tables: dict[int, list[int]] = {}
        self._num_computed: dict[int, int] = {}

    def step(self, chunks: Sequence[tuple[int, Sequence[int]]]) -> list[torch.Tensor]:
        """Compute ``(sequence, its next tokens)`` together; logits [number of tokens, vocab_size] of each."""
        for sequence, tokens in chunks:
            table = self._tables.setdefault(sequence, [])
            length = self._num_computed.setdefault(sequence, 0) + len(tokens)
            while len(table) * self.block_size < length:
                table.append(self._free.pop())
        tables = [self._tables[sequence] for sequence, _ in chunks]
        padded = np.zeros((len(tables), max(map(len, tables))), np.int32)
        for row, table in zip(padded, tables, strict=True):
            row[: len(table)] = table
        batch = RaggedBatch(
            num_computed=np.array([self._num_computed[sequence] for sequence, _ in chunks], np.int32),
            num_new=np.array([len(tokens) for _, tokens in chunks], np.int32),
            block_tables=padded,
            block_size=self.block_size,
        )
        spans = [range(self._num_computed[s], self._num_computed[s] + len(tokens)) for s, tokens in chunks]
        positions = torch.tensor([position for span in spans for position in span], device=self.device)
        plan = self.attention.plan(batch, device=self.device)
        hidden = torch.tensor([token for _, tokens in chunks for token in tokens], device=self.device)
        for stage, layers in self.parts:
            hidden = stage.forward(
                hidden,
                layers=layers,
                is_first=layers.start == 0,
                rotary=stage.rotary(positions),
                plan=plan,
                kv=self._kv,
            )
        for sequence, tokens in chunks:
            self._num_computed[sequence] += len(tokens)
        logits = self.parts[-1][0].logits(hidden)
        return list(logits.split([len(tokens) for _, tokens in chunks]))


def make_pipeline(
    folder: Path,
    *,
    boundaries: Sequence[int] = (),
    linear: str = "plain",
    max_model_len: int | None = None,
    attention: AttentionBackend | None = None,
    device: torch.device = CPU,
    dtype: torch.dtype = torch.float32,
    block_size: int = BLOCK_SIZE,
) -> Pipeline:
    """A pipeline of stages that split the model at ``boundaries``."""
    spec = load_spec(folder, max_model_len=max_model_len)
    attention = attention or TorchAttention(dtype=dtype)
    cuts = [0, *boundaries, spec.num_layers]
    parts = []
    for start, stop in itertools.pairwise(cuts):
        stage = StageModel(spec, device=device, dtype=dtype, attention=attention, linear=linear)
        stage.load(range(start, stop), embedding=start == 0, head=stop == spec.num_layers)
        parts.append((stage, range(start, stop)))
    return Pipeline(spec, parts, attention=attention, device=device, dtype=dtype, block_size=block_size)


@torch.inference_mode()
def reference_logits(model: PreTrainedModel, tokens: Sequence[int]) -> torch.Tensor:
    """transformers' own logits [len(tokens), vocab_size]."""
    return model(torch.tensor([list(tokens)])).logits[0].float()
