"""From what the user names to a folder, and from the folder to the static facts of the model.

Imports no torch: the Router reads these facts too, and must start fast.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexpipe_serve.errors import ConfigError, UnsupportedModelError
from flexpipe_serve.model.demo import DEMO_NAME, ensure_demo
from flexpipe_serve.model.support import FAMILIES, Family, check_supported, rope_fields, rope_type
from flexpipe_serve.model.tensor_index import TensorInfo, count_layer_elements, read_tensor_index

_HUB_PATTERNS = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "*.txt"]
_DTYPE_SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}

EMBEDDING_NAME = "model.embed_tokens.weight"
NORM_NAME = "model.norm.weight"
HEAD_NAME = "lm_head.weight"


def resolve_source(source: str) -> Path:
    """The folder of the model that ``source`` names: ``demo``, a local folder, or a hub id such as ``org/name``.

    Fetches what is not there yet.

    Raises:
        ConfigError: there is no such model, or it cannot be fetched.
    """
    if source == DEMO_NAME:
        return ensure_demo()
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder.resolve()
    if folder.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1:
        raise ConfigError(f"model.source is {source!r}, but there is no such folder.")
    # Slow to import, and needed for hub ids only.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source, allow_patterns=_HUB_PATTERNS))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigError(
            f"model.source is {source!r}: no local folder has this name, and it cannot be fetched as a hub id "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}); name a folder with "
            f"config.json and safetensors, a reachable hub id, or {DEMO_NAME!r}."
        ) from error


@dataclass(frozen=True, kw_only=True)
class DefaultRope:
    """Rotary embedding that is not scaled: dimension i of half ``dim`` turns by ``theta ** (-2 i / dim)`` a token."""

    theta: float
    dim: int
    """How many dimensions of a head are rotated."""


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Static facts of one model, from its configuration and the headers of its weights."""

    path: Path
    model_type: str
    architecture: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    """Width of the feed-forward part that one token passes: with experts, of all experts it visits together."""
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_model_len: int
    tied_embeddings: bool
    eos_token_ids: tuple[int, ...]
    layer_elements: tuple[int, ...]
    """Number of weights of each layer."""
    embedding_elements: int
    norm_elements: int
    norm_eps: float
    fused: bool
    """Whether FusedLayer computes the layers; else transformers' own do."""
    default_rope: DefaultRope | None
    """Rotary embedding of fused layers; None: it is scaled, and transformers' own module computes it."""

    @property
    def family(self) -> Family:
        return FAMILIES[self.model_type]

    def layer_bytes(self, layer: int, dtype: str) -> int:
        """Weight bytes of one layer in ``dtype`` (float32, bfloat16 or float16)."""
        return self.layer_elements[layer] * dtype_size(dtype)

    def embedding_bytes(self, dtype: str) -> int:
        """Bytes of the embedding, which the first stage holds."""
        return self.embedding_elements * dtype_size(dtype)

    def head_bytes(self, dtype: str) -> int:
        """Bytes of the final norm and the LM head, which the last stage holds."""
        return (self.norm_elements + self.embedding_elements) * dtype_size(dtype)

    @property
    def linear_shapes(self) -> tuple[tuple[int, int], ...]:
        """(out_features, in_features) of the merged linear maps of one layer, experts left out."""
        heads = self.num_heads * self.head_dim
        qkv = (heads + 2 * self.num_kv_heads * self.head_dim, self.hidden_size)
        attention = (qkv, (self.hidden_size, heads))
        if self.family.experts:
            return attention
        return (*attention, (2 * self.intermediate_size, self.hidden_size), (self.hidden_size, self.intermediate_size))

    def kv_bytes_per_token(self, dtype: str) -> int:
        """KV bytes of one token in one layer."""
        return 2 * self.num_kv_heads * self.head_dim * dtype_size(dtype)


def dtype_size(dtype: str) -> int:
    """Bytes of one element. Raises ConfigError for a dtype that is not served."""
    if dtype not in _DTYPE_SIZES:
        raise ConfigError(f"dtype is {dtype!r}; it must be one of {', '.join(_DTYPE_SIZES)}.")
    return _DTYPE_SIZES[dtype]


def load_spec(path: Path | str, *, max_model_len: int | None = None) -> ModelSpec:
    """The facts of the model in folder ``path``, from ``config.json`` and the headers of its safetensors files.

    Args:
        max_model_len: longest sequence to serve; None takes the model's own limit.

    Raises:
        ConfigError: the folder is incomplete, or ``max_model_len`` is out of range.
        UnsupportedModelError: the model would not be computed rightly.
    """
    path = Path(path)
    config = _read_json(path / "config.json")
    model_limit = config.get("max_position_embeddings")
    limit = model_limit if max_model_len is None else max_model_len
    # First of all: an unknown architecture may lack every other field.
    family = check_supported(config, max_model_len=limit or 0)
    if not isinstance(limit, int) or not 1 <= limit <= _int(config, "max_position_embeddings"):
        raise ConfigError(f"max_model_len is {limit}; this model permits 1 to {model_limit}.")

    fused = family.fused and config.get("hidden_act", "silu") == "silu"
    index = read_tensor_index(path)
    num_layers, hidden_size = _int(config, "num_hidden_layers"), _int(config, "hidden_size")
    elements = count_layer_elements(index)
    missing = sorted(set(range(num_layers)) - set(elements))
    if missing or EMBEDDING_NAME not in index or NORM_NAME not in index:
        raise UnsupportedModelError(
            f"{path} lacks weights named model.layers.{min(missing, default=0)}.*, {EMBEDDING_NAME} or {NORM_NAME}: "
            f"it is incomplete or not laid out like {config['architectures'][0]} in transformers."
        )
    num_heads = _int(config, "num_attention_heads")
    head_dim, num_kv_heads = _head_geometry(config, index, num_heads)
    tied = bool(config.get("tie_word_embeddings", HEAD_NAME not in index))
    if not tied and HEAD_NAME not in index:
        raise UnsupportedModelError(f"{path} has no {HEAD_NAME} though tie_word_embeddings is false.")
    vocab_size = _int(config, "vocab_size")
    if index[EMBEDDING_NAME].shape != (vocab_size, hidden_size):
        raise UnsupportedModelError(
            f"{EMBEDDING_NAME} has shape {index[EMBEDDING_NAME].shape}, but the configuration says "
            f"{(vocab_size, hidden_size)}."
        )
    return ModelSpec(
        path=path,
        model_type=config["model_type"],
        architecture=config["architectures"][0],
        num_layers=num_layers,
        hidden_size=hidden_size,
        intermediate_size=_intermediate_size(config),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=vocab_size,
        max_model_len=limit,
        tied_embeddings=tied,
        eos_token_ids=_eos_token_ids(config, path),
        layer_elements=tuple(elements[layer] for layer in range(num_layers)),
        embedding_elements=index[EMBEDDING_NAME].num_elements,
        norm_elements=index[NORM_NAME].num_elements,
        norm_eps=_float(config, "rms_norm_eps", family.default_norm_eps),
        fused=fused,
        default_rope=_default_rope(config, family, head_dim) if fused else None,
    )


def _head_geometry(config: Mapping[str, Any], index: Mapping[str, TensorInfo], num_heads: int) -> tuple[int, int]:
    """Head size and number of KV heads: from the weights, as defaults differ from one model type to the next."""
    attention = "model.layers.0.self_attn."
    if merged := index.get(attention + "qkv_proj.weight"):
        head_dim = config.get("head_dim") or _int(config, "hidden_size") // num_heads
        return head_dim, (merged.shape[0] // head_dim - num_heads) // 2
    try:
        head_dim = index[attention + "q_proj.weight"].shape[0] // num_heads
        return head_dim, index[attention + "k_proj.weight"].shape[0] // head_dim
    except KeyError as error:
        raise UnsupportedModelError(f"The checkpoint has no weight {error.args[0]}.") from None


def _intermediate_size(config: Mapping[str, Any]) -> int:
    width = _int(config, "moe_intermediate_size" if "moe_intermediate_size" in config else "intermediate_size")
    return width * int(config.get("num_experts_per_tok") or 1)


def _default_rope(config: Mapping[str, Any], family: Family, head_dim: int) -> DefaultRope | None:
    if rope_type(config) != "default":
        return None
    fields = {**config, **rope_fields(config)}
    factor = _float(fields, "partial_rotary_factor", 1.0) if family.partial_rotary else 1.0
    return DefaultRope(theta=_float(fields, "rope_theta", 10_000.0), dim=int(head_dim * factor))


def _eos_token_ids(config: Mapping[str, Any], path: Path) -> tuple[int, ...]:
    generation = path / "generation_config.json"
    ids: set[int] = set()
    for source in (config, _read_json(generation) if generation.is_file() else {}):
        eos = source.get("eos_token_id")
        ids.update(eos if isinstance(eos, list) else [] if eos is None else [eos])
    return tuple(sorted(ids))


def _int(config: Mapping[str, Any], field: str) -> int:
    value = config.get(field)
    if not isinstance(value, int) or value < 1:
        raise ConfigError(f"config.json has {field} = {value!r}; it must be a positive integer.")
    return value


def _float(config: Mapping[str, Any], field: str, default: float) -> float:
    value = config.get(field, default)
    if not isinstance(value, int | float) or value <= 0:
        raise ConfigError(f"config.json has {field} = {value!r}; it must be a positive number.")
    return float(value)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except FileNotFoundError:
        raise ConfigError(f"{file.parent} has no {file.name}: it is not a model folder of transformers.") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{file} is not JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{file} holds {type(content).__name__}, not an object.")
    return content
