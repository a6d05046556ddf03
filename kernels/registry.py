"""Which attention backend runs: by name, or the best one for the device."""

from __future__ import annotations

import torch

from flexpipe_serve.errors import ConfigError
from flexpipe_serve.kernels import flash_attention
from flexpipe_serve.kernels.attention import AttentionBackend
from flexpipe_serve.kernels.native import native_library
from flexpipe_serve.kernels.native_attention import NativeAttention
from flexpipe_serve.kernels.torch_attention import TorchAttention

ATTENTION_NAMES = ("auto", "torch", "native", "flash_attn")


def get_attention_backend(name: str, *, device: torch.device, dtype: torch.dtype) -> AttentionBackend:
    """The backend called ``name``; ``auto`` takes flash-attn or native where they can run, else torch.

    Raises:
        ConfigError: there is no such backend, or it cannot run on this device.
    """
    if name not in ATTENTION_NAMES:
        raise ConfigError(f"attention backend is {name!r}; it must be one of {', '.join(ATTENTION_NAMES)}.")
    flash_runs = dtype in flash_attention.DTYPES and flash_attention.is_available(device)
    if name == "flash_attn" and not flash_runs:
        raise ConfigError(
            f"attention backend flash_attn cannot run on {device} in {dtype}: it needs a CUDA device of compute "
            "capability 8.0 or more, float16 or bfloat16, and the flash-attn package "
            "(pip install 'flexpipe-serve[gpu]'); use 'torch' or 'auto'."
        )
    if flash_runs and name in ("auto", "flash_attn"):
        return flash_attention.FlashAttention()
    if name in ("auto", "native"):
        library = native_library() if device.type == "cpu" and dtype == torch.float32 else None
        if library is not None:
            return NativeAttention(library)
        if name == "native":
            raise ConfigError(
                f"attention backend native cannot run on {device} in {dtype}: it needs a CPU, float32 and a C++ "
                "compiler (g++; a warning in the log says why compiling failed); use 'torch' or 'auto'."
            )
    return TorchAttention(dtype=dtype)


def check_block_size(backend: AttentionBackend, block_size: int) -> None:
    """Raises ConfigError unless the backend can work with blocks of ``block_size`` tokens."""
    multiple = backend.block_size_multiple
    if block_size < 1 or block_size % multiple:
        permitted = "1, 2, 3, ..." if multiple == 1 else f"{multiple}, {2 * multiple}, {3 * multiple}, ..."
        raise ConfigError(
            f"block_size is {block_size}; attention backend {backend.name} permits {permitted}: "
            "set block_size to one of these or choose another attention backend."
        )
