"""The shared library of CPU kernels in ``csrc``: compiled on first use with the machine's C++ compiler.

A plain C interface without torch's headers compiles in seconds, and for exactly this processor. Where there is no
compiler everything runs on torch's own kernels.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
import threading
from functools import lru_cache
from pathlib import Path

import torch

from flexpipe_serve.model.cache import cache_home

logger = logging.getLogger(__name__)
_choice = threading.local()

_SOURCES = Path(__file__).parent / "csrc"
_FLAGS = ("-std=c++20", "-O3", "-march=native", "-ffp-contract=fast", "-fPIC", "-shared", "-pthread")


class NativeBuildError(Exception):
    """The kernels cannot be compiled or loaded on this machine; the message says why."""


@lru_cache(maxsize=1)
def native_library() -> ctypes.CDLL | None:
    """The kernels, or None (and one warning with the reason) where they cannot be built. Calls release the GIL."""
    try:
        return _load(build(cache_home() / "native"))
    except NativeBuildError as error:
        logger.warning("CPU kernels are not available, torch's own are used instead: %s", error)
        return None


def build(folder: Path) -> Path:
    """Compile the kernels into ``folder``, unless this compiler did so before for this machine.

    Several processes may call this at once: one compiles, the others wait.

    Raises:
        NativeBuildError: there is no compiler, or it failed.
    """
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        raise NativeBuildError("there is no C++ compiler; install g++.")
    sources = sorted(_SOURCES.iterdir())
    # What the compiler predefines names its version and every feature of the processor that it will use.
    digest = hashlib.sha256(_run([compiler, *_FLAGS, "-dM", "-E", "-x", "c++", os.devnull]))
    for source in sources:
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    library = folder / f"{digest.hexdigest()[:16]}.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            with tempfile.TemporaryDirectory(dir=folder) as temporary:
                output = Path(temporary) / library.name
                _run([compiler, *_FLAGS, *(str(source) for source in sources if source.suffix == ".cpp")], output)
                output.rename(library)
    return library


def set_native_threads(num_threads: int) -> None:
    """How many threads the kernels called by this thread may use; torch's number where it was never said.

    Torch's own operators can then be kept to one: the threads of an OpenMP region spin for milliseconds after it, on
    cores that other stages need.
    """
    _choice.num_threads = num_threads


def native_threads() -> int:
    """Threads for a kernel called by this thread."""
    chosen: int | None = getattr(_choice, "num_threads", None)
    return chosen or torch.get_num_threads()


def _run(command: list[str], output: Path | None = None) -> bytes:
    if output is not None:
        command = [*command, "-o", str(output)]
    try:
        process = subprocess.run(command, capture_output=True, check=False)
    except OSError as error:
        raise NativeBuildError(f"{command[0]} cannot be run: {error}.") from error
    if process.returncode != 0:
        lines = process.stderr.decode(errors="replace").strip().splitlines()
        reason = next((line for line in lines if "error" in line), lines[-1] if lines else "no message")
        raise NativeBuildError(f"{command[0]} ended with {process.returncode}: {reason}")
    return process.stdout


def _load(path: Path) -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise NativeBuildError(f"{path} cannot be loaded: {error}.") from error
    pointer, count, threads = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    library.flexpipe_panel.argtypes = ()
    library.flexpipe_panel.restype = count
    library.flexpipe_block_bytes.argtypes = (count,)
    library.flexpipe_block_bytes.restype = count
    library.flexpipe_encode.argtypes = (count, pointer, count, count, count, count, pointer)
    library.flexpipe_encode.restype = threads
    library.flexpipe_rows.argtypes = (pointer, pointer, count, pointer)
    library.flexpipe_linear.argtypes = (pointer, pointer, count, pointer, pointer, threads)
    library.flexpipe_attention.argtypes = (
        *(pointer, pointer, pointer, count),
        *(pointer, count, pointer, count),
        *(pointer, pointer, threads),
    )
    library.flexpipe_layers.argtypes = (pointer, pointer, count, pointer, pointer, pointer, count, threads)
    library.flexpipe_await_hop.argtypes = (pointer, threads, threads)
    library.flexpipe_await_hop.restype = threads
    library.flexpipe_run_hop.argtypes = (pointer,)
    names = ("flexpipe_linear", "flexpipe_rows", "flexpipe_attention", "flexpipe_layers", "flexpipe_run_hop")
    for name in names:
        getattr(library, name).restype = None
    return library
