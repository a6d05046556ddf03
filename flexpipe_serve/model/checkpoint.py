"""Reads single tensors of a checkpoint, from only the files that hold them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from flexpipe_serve.errors import ConfigError
from flexpipe_serve.model.tensor_index import TensorInfo, layer_names, read_tensor_index


class Checkpoint:
    """A safetensors checkpoint in a folder.

    What is read is copied into memory of its own and the file mapping dropped, so a process is charged for the
    tensors that it keeps and not for the file.

    Raises:
        UnsupportedModelError: the weights are in another format than safetensors.
        ConfigError: a file is missing or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.index: dict[str, TensorInfo] = read_tensor_index(path)

    def read(
        self, names: Iterable[str], *, device: torch.device, dtype: torch.dtype, between: Callable[[], None]
    ) -> dict[str, torch.Tensor]:
        """Tensors ``names`` on ``device`` in ``dtype``; ``between`` is called after each.

        Raises:
            ConfigError: a file is missing or damaged.
        """
        tensors: dict[str, torch.Tensor] = {}
        with ExitStack() as stack:
            shards = {}
            for name in names:
                file = self.index[name].file
                try:
                    if file not in shards:
                        shards[file] = stack.enter_context(safe_open(file, framework="pt"))
                    tensor = shards[file].get_tensor(name)
                except (OSError, SafetensorError) as error:
                    raise ConfigError(f"{file} is missing or damaged, {name} cannot be read: {error}") from error
                tensors[name] = tensor.to(device=device, dtype=dtype, copy=True)
                between()
        return tensors

    def read_layer(
        self, layer: int, *, device: torch.device, dtype: torch.dtype, between: Callable[[], None]
    ) -> dict[str, torch.Tensor]:
        """All tensors of one layer, by their names within it (``self_attn.q_proj.weight``)."""
        names = layer_names(self.index, layer)
        tensors = self.read(names, device=device, dtype=dtype, between=between)
        return {name.split(".", 3)[3]: tensor for name, tensor in tensors.items()}
