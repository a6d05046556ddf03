"""Reads single tensors of a checkpoint, from only the files that hold them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from flexpipe_serve.errors import ConfigError
from flexpipe_serve.model.tensor_index import TensorInfo, layer_names, read_tensor_index

_PIECE_BYTES = 2 << 20


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

    @property
    def fingerprint(self) -> str:
        """Of the files as they lie in the file system now: other weights have another one."""
        digest = hashlib.sha256()
        for file in sorted({info.file for info in self.index.values()}):
            status = file.stat()
            digest.update(repr((str(file), status.st_ino, status.st_size, status.st_mtime_ns)).encode())
        return digest.hexdigest()

    def read(
        self, names: Iterable[str], *, device: torch.device, dtype: torch.dtype, between: Callable[[], None]
    ) -> dict[str, torch.Tensor]:
        """Tensors ``names`` on ``device`` in ``dtype``; ``between`` is called after every few MB.

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
                tensors[name] = _copy(tensor, device=device, dtype=dtype, between=between)
        return tensors

    def read_layer(
        self, layer: int, *, device: torch.device, dtype: torch.dtype, between: Callable[[], None]
    ) -> dict[str, torch.Tensor]:
        """All tensors of one layer, by their names within it (``self_attn.q_proj.weight``)."""
        names = layer_names(self.index, layer)
        tensors = self.read(names, device=device, dtype=dtype, between=between)
        return {name.split(".", 3)[3]: tensor for name, tensor in tensors.items()}


def _copy(
    tensor: torch.Tensor, *, device: torch.device, dtype: torch.dtype, between: Callable[[], None]
) -> torch.Tensor:
    copied = torch.empty(tensor.shape, device=device, dtype=dtype)
    num_rows = max(1, _PIECE_BYTES // max(1, tensor[:1].nbytes)) if tensor.dim() else 0
    if len(tensor.shape) and num_rows < len(tensor):
        for start in range(0, len(tensor), num_rows):
            copied[start : start + num_rows].copy_(tensor[start : start + num_rows])
            between()
    else:
        copied.copy_(tensor)
        between()
    return copied
