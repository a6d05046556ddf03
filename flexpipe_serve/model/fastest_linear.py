"""The kind of linear map that all stages on this machine use for a model."""

from __future__ import annotations

import fcntl

import torch

from flexpipe_serve.kernels.linear_choice import choose_linear
from flexpipe_serve.model.cache import cache_home
from flexpipe_serve.model.source import ModelSpec


def fastest_linear(spec: ModelSpec, *, dtype: torch.dtype, device: torch.device) -> str:
    """The fastest kind for the model's shapes, measured once on this machine.

    On one thread: the order of the kinds is the same with more, and other work on the cores disturbs it less. One
    process measures while the others wait for its answer: all stages must agree, so that a layer gives the same bits
    on whichever it runs.
    """
    folder = cache_home() / "linear"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return choose_linear(
            spec.linear_shapes,
            dtype=dtype,
            device=device,
            num_threads=1,
            cache_folder=folder,
        )
