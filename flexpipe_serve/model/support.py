"""Which models are computed rightly. What no test has shown to agree with transformers is refused, with the reason.

To add a model type: add it to ``FAMILIES`` and its tiny checkpoint to ``tests/unit/test_model_families.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flexpipe_serve.errors import UnsupportedModelError


@dataclass(frozen=True, kw_only=True)
class ExpertNames:
    """How the checkpoint names the weights of a mixture's experts, which transformers holds stacked."""

    checkpoint_prefix: str
    """Stands where the module says ``mlp``."""
    gate: str
    up: str
    down: str


@dataclass(frozen=True, kw_only=True)
class Family:
    """One tested model type."""

    fused: bool
    """Whether FusedLayer computes it (Llama-like: pre-norm, RMSNorm, SwiGLU); else transformers' own layer runs."""
    default_window: int | None = None
    """``sliding_window`` where the configuration does not say."""
    window_switch: bool = False
    """Whether the window only counts with ``use_sliding_window``."""
    default_norm_eps: float = 1e-6
    """``rms_norm_eps`` where the configuration does not say."""
    partial_rotary: bool = False
    """Whether ``partial_rotary_factor`` counts where rope is not scaled."""
    experts: ExpertNames | None = None


_QWEN_EXPERTS = ExpertNames(checkpoint_prefix="mlp", gate="gate_proj", up="up_proj", down="down_proj")

FAMILIES: Mapping[str, Family] = {
    "llama": Family(fused=True),
    "mistral": Family(fused=True, default_window=4096),
    "qwen2": Family(fused=True, default_window=4096, window_switch=True),
    "qwen3": Family(fused=True, default_window=4096, window_switch=True),
    "phi3": Family(fused=True, default_norm_eps=1e-5, partial_rotary=True),
    "olmo2": Family(fused=False, default_norm_eps=1e-5),
    "mixtral": Family(
        fused=False,
        default_norm_eps=1e-5,
        experts=ExpertNames(checkpoint_prefix="block_sparse_moe", gate="w1", up="w3", down="w2"),
    ),
    "qwen2_moe": Family(fused=False, default_window=4096, window_switch=True, experts=_QWEN_EXPERTS),
    "qwen3_moe": Family(fused=False, default_window=4096, window_switch=True, experts=_QWEN_EXPERTS),
}

_ROPE_TYPES = ("default", "linear", "llama3", "yarn", "longrope")

# Fields that give away an architecture, whatever its name, and why it is not served.
_TELLTALE_FIELDS = {
    "quantization_config": "quantised checkpoints are not read; use the original weights",
    "vision_config": "multimodal models are not served; use a text-only checkpoint",
    "audio_config": "multimodal models are not served; use a text-only checkpoint",
    "text_config": "nested (multimodal) configurations are not served; use a text-only checkpoint",
    "is_encoder_decoder": "encoder-decoder models are not served; use a decoder-only model",
    "kv_lora_rank": "multi-head latent attention keeps another KV cache than blocks of keys and values",
    "linear_num_value_heads": "linear-attention layers keep a state, not a KV cache",
    "mamba_d_state": "state-space layers keep a state, not a KV cache",
    "ssm_cfg": "state-space layers keep a state, not a KV cache",
    "attn_logit_softcapping": "soft-capped attention scores are not computed by the attention backends",
    "alibi": "ALiBi positions are not computed by the attention backends",
    "use_bidirectional_attention": "attention that is not causal cannot be cached",
}


def check_supported(config: Mapping[str, Any], *, max_model_len: int) -> Family:
    """The family of a model whose ``config.json`` is ``config``, served up to ``max_model_len`` tokens.

    Raises:
        UnsupportedModelError: the model would not be computed rightly; the message says what was seen and what to do.
    """
    model_type = config.get("model_type")
    for field, reason in _TELLTALE_FIELDS.items():
        if config.get(field):
            raise UnsupportedModelError(f"model type {model_type!r} sets {field}: {reason}.")
    family = FAMILIES.get(str(model_type))
    if family is None:
        raise UnsupportedModelError(
            f"model type {model_type!r} is not known to be computed rightly; known are {', '.join(FAMILIES)}."
        )
    architectures = config.get("architectures") or ()
    if not any(str(name).endswith("ForCausalLM") for name in architectures):
        raise UnsupportedModelError(
            f"architectures is {list(architectures)}: only causal language models (...ForCausalLM) are served; "
            "use a checkpoint with a language-model head."
        )
    if config.get("is_causal") is False:
        raise UnsupportedModelError("is_causal is false: attention that is not causal cannot be cached.")
    _check_layers_alike(config)
    _check_window(config, family, max_model_len)
    _check_rope(config, max_model_len)
    return family


def rope_fields(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The parameters of the rotary embedding, under the name that transformers prefers of the old and the new one."""
    return config.get("rope_scaling") or config.get("rope_parameters") or {}


def rope_type(config: Mapping[str, Any]) -> str:
    """How rotations are scaled beyond the length trained on; ``default``: not at all."""
    rope = rope_fields(config)
    return str(rope.get("rope_type") or rope.get("type") or "default")


def _check_layers_alike(config: Mapping[str, Any]) -> None:
    others = sorted(set(config.get("layer_types") or ()) - {"full_attention", "sliding_attention"})
    if others:
        raise UnsupportedModelError(f"layer_types has {', '.join(others)}: only full_attention layers are served.")


def _check_window(config: Mapping[str, Any], family: Family, max_model_len: int) -> None:
    window = config.get("sliding_window", family.default_window)
    if family.window_switch and not config.get("use_sliding_window", False):
        window = None
    if "sliding_attention" in (config.get("layer_types") or ()):
        window = config.get("sliding_window") or family.default_window
    if window is not None and window < max_model_len:
        raise UnsupportedModelError(
            f"sliding_window is {window} and max_model_len is {max_model_len}: sliding-window attention is not "
            f"computed; set max_model_len to at most {window}, where the window makes no difference."
        )


def _check_rope(config: Mapping[str, Any], max_model_len: int) -> None:
    rope = rope_fields(config)
    if any(isinstance(value, Mapping) for value in rope.values()):
        raise UnsupportedModelError("rope_parameters differ by layer type: only one rotary embedding is served.")
    kind = rope_type(config)
    if kind not in _ROPE_TYPES:
        raise UnsupportedModelError(
            f"rope_type is {kind!r}: its rotations depend on the other sequences of a batch, or it is unknown; "
            f"served are {', '.join(_ROPE_TYPES)}."
        )
    if kind == "longrope":
        original = rope.get("original_max_position_embeddings") or config.get("original_max_position_embeddings")
        if original is None or max_model_len > original:
            raise UnsupportedModelError(
                f"rope_type is 'longrope' and max_model_len is {max_model_len}: beyond {original} tokens its rotations "
                f"would change for tokens already cached; set max_model_len to at most {original}."
            )
