"""What a safetensors checkpoint holds and in which file, from its headers alone. Imports no torch."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

from safetensors import SafetensorError, safe_open

from flexpipe_serve.errors import ConfigError, UnsupportedModelError

LAYER_PREFIX = "model.layers."
_LAYER = re.compile(r"^model\.layers\.(\d+)\.")
# Old checkpoints carry this buffer; the model computes it.
_NOT_WEIGHTS = ("rotary_emb.inv_freq",)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of the checkpoint."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    """As safetensors names it: ``F32``, ``BF16``, ..."""

    @property
    def num_elements(self) -> int:
        return prod(self.shape)


def read_tensor_index(path: Path) -> dict[str, TensorInfo]:
    """Every weight of the checkpoint in folder ``path`` by its name.

    Raises:
        UnsupportedModelError: the weights are in another format than safetensors.
        ConfigError: a file that the checkpoint's index names is missing or damaged.
    """
    index: dict[str, TensorInfo] = {}
    for file in _shards(path):
        try:
            with safe_open(file, framework="np") as shard:
                for name in shard.keys():  # noqa: SIM118 (not a mapping)
                    if not name.endswith(_NOT_WEIGHTS):
                        tensor = shard.get_slice(name)
                        index[name] = TensorInfo(file, tuple(tensor.get_shape()), tensor.get_dtype())
        except FileNotFoundError:
            raise ConfigError(f"{file} is missing though the checkpoint's index names it; fetch it again.") from None
        except SafetensorError as error:
            raise ConfigError(f"{file} cannot be read as safetensors ({error}); fetch it again.") from error
    return index


def layer_names(index: Mapping[str, TensorInfo], layer: int) -> list[str]:
    """Names of the tensors of one layer."""
    prefix = f"{LAYER_PREFIX}{layer}."
    return [name for name in index if name.startswith(prefix)]


def count_layer_elements(index: Mapping[str, TensorInfo]) -> dict[int, int]:
    """Number of weights of each layer, by its index."""
    counts: dict[int, int] = {}
    for name, info in index.items():
        if match := _LAYER.match(name):
            layer = int(match[1])
            counts[layer] = counts.get(layer, 0) + info.num_elements
    return counts


def _shards(path: Path) -> list[Path]:
    index_file = path / "model.safetensors.index.json"
    if index_file.is_file():
        try:
            names = set(json.loads(index_file.read_text())["weight_map"].values())
        except (json.JSONDecodeError, KeyError, AttributeError) as error:
            raise ConfigError(f"{index_file} is not a checkpoint index ({error!r}); fetch it again.") from error
        return [path / name for name in sorted(names)]
    single = path / "model.safetensors"
    if single.is_file():
        return [single]
    others = sorted({file.name for pattern in ("*.bin", "*.pt", "*.pth", "*.gguf") for file in path.glob(pattern)})
    if others:
        raise UnsupportedModelError(
            f"{path} has no model.safetensors, only {', '.join(others[:3])}: only safetensors is read layer by layer; "
            "load the model with transformers and save it again with save_pretrained()."
        )
    raise ConfigError(f"{path} has no model.safetensors and no model.safetensors.index.json.")
