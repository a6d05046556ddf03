"""Which kind of linear map is fastest on this machine: timed once on the model's shapes and remembered."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from flexpipe_serve.kernels.linear import Linear, available_kinds, pack_linear

# Rows at a time, and how much each counts: a server spends most of its steps in small decode batches.
_ROWS = {1: 1.0, 4: 1.0, 8: 1.0, 16: 1.0}
_NUM_COPIES = 4
_NUM_ROUNDS = 5
_TIME_LIMIT_S = 1.2
# The preferred kind (see available_kinds) stays unless another is faster by this factor.
_MARGIN = 1.1


def choose_linear(
    shapes: Sequence[tuple[int, int]], *, dtype: torch.dtype, device: torch.device, num_threads: int, cache_folder: Path
) -> str:
    """The kind of linear map to use for layers whose maps have ``shapes``.

    Measures for about a second the first time, and reads the answer from ``cache_folder`` after that.

    Args:
        shapes: (out_features, in_features) of one layer's maps.
        num_threads: CPU threads that a stage will use.
        cache_folder: where answers are kept, one file for each machine, torch, dtype, thread count, set of kinds and
            of shapes.
    """
    kinds = available_kinds(device, dtype)
    if len(kinds) == 1 or not shapes:
        return kinds[0]
    key = [
        _cpu_model(),
        torch.backends.cpu.get_cpu_capability(),
        torch.__version__,
        str(dtype),
        num_threads,
        kinds,
        *shapes,
    ]
    file = cache_folder / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}.json"
    remembered = _read(file)
    if remembered in kinds:
        return remembered
    previous_threads = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        seconds = measure(kinds, shapes, dtype=dtype)
    finally:
        torch.set_num_threads(previous_threads)
    best = min(kinds, key=lambda kind: seconds[kind] / (_MARGIN if kind == kinds[0] else 1.0))
    _write(file, {"kind": best, "seconds": seconds, "key": key})
    return best


@torch.inference_mode()
def measure(kinds: Sequence[str], shapes: Sequence[tuple[int, int]], *, dtype: torch.dtype) -> dict[str, float]:
    """Weighted seconds that each kind takes for some layers' maps: the smallest of several interleaved rounds.

    The weights of several layers are used in turn, so that they come from memory and not from a cache.
    """
    weights = [torch.randn(shape, dtype=dtype) for _ in range(_NUM_COPIES) for shape in shapes]
    maps = {kind: [pack_linear(weight, kind=kind) for weight in weights] for kind in kinds}
    inputs = {rows: [torch.randn(rows, weight.shape[1], dtype=dtype) for weight in weights] for rows in _ROWS}
    best = {(kind, rows): float("inf") for kind in kinds for rows in _ROWS}
    deadline = time.perf_counter() + _TIME_LIMIT_S
    for round_index in range(_NUM_ROUNDS):
        for kind, rows in best:
            best[kind, rows] = min(best[kind, rows], _time(maps[kind], inputs[rows]))
        if round_index and time.perf_counter() > deadline:
            break
    return {kind: sum(weight * best[kind, rows] for rows, weight in _ROWS.items()) for kind in kinds}


def _time(maps: Sequence[Linear], inputs: Sequence[torch.Tensor]) -> float:
    start = time.perf_counter()
    for linear, x in zip(maps, inputs, strict=True):
        linear(x)
    return time.perf_counter() - start


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def _read(file: Path) -> str | None:
    try:
        kind = json.loads(file.read_text())["kind"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return str(kind)


def _write(file: Path, content: dict[str, object]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=file.parent)
    with os.fdopen(descriptor, "w") as out:
        json.dump(content, out)
    Path(temporary).rename(file)
