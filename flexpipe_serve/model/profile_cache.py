"""Profiles measured on this machine, kept by what they depend on; and measuring one in the background.

Imports no torch: the Router reads profiles, and must start fast.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import Future
from functools import lru_cache
from pathlib import Path

import msgspec

import flexpipe_serve
from flexpipe_serve.errors import ConfigError
from flexpipe_serve.model.cache import cache_home
from flexpipe_serve.model.tensor_index import read_tensor_index
from flexpipe_serve.planner.profile import ModelProfile

_PACKAGES = ("torch", "transformers")
_KERNELS = Path(flexpipe_serve.__file__).parent / "kernels"
_COMMAND = (
    "import sys; from flexpipe_serve.model.profile_cache import yield_to_others; yield_to_others(int(sys.argv[1]));"
    "from flexpipe_serve.cli import main; sys.exit(main(['profile', *sys.argv[2:]]))"
)
_PR_SET_PDEATHSIG = 1
_LOWEST = 19


def load_profile(path: Path, *, dtype: str, device: str, num_threads: int) -> ModelProfile | None:
    """The profile of the model in folder ``path``, if it was measured on such a device with these libraries.

    Args:
        dtype: of weights and KV: float32, bfloat16 or float16.
        device: 'cpu' or 'cuda'; of this node.
        num_threads: CPU threads of a step; does not matter on CUDA.

    Raises:
        ConfigError, UnsupportedModelError: the folder holds no model.
    """
    file = cache_file(path, dtype=dtype, device=device, num_threads=num_threads)
    try:
        return read_profile(file) if file.is_file() else None
    except ConfigError:
        return None  # of a version whose profiles were different


def start_profiling(path: Path, *, dtype: str, device: str, num_threads: int) -> Future[ModelProfile]:
    """Measure a profile with ``flexpipe profile`` in a process of the lowest priority, which ends with this one.

    Several processes may call this at once: one measures, the others wait for what it found. The future fails with
    ConfigError where it cannot be measured.

    Args: as of :func:`load_profile`.
    """
    done: Future[ModelProfile] = Future()

    def run() -> None:
        try:
            done.set_result(_measure_once(path, dtype=dtype, device=device, num_threads=num_threads))
        except Exception as error:  # thread edge: the caller gets it
            done.set_exception(error)

    threading.Thread(target=run, name="flexpipe-profiling", daemon=True).start()
    return done


def read_profile(file: Path) -> ModelProfile:
    """A profile from a file that ``flexpipe profile --output`` wrote.

    Raises:
        ConfigError: there is none, or it is not a profile of this version.
    """
    try:
        return msgspec.json.decode(file.read_bytes(), type=ModelProfile)
    except OSError as error:
        raise ConfigError(
            f"the profile cannot be read: {error}; `flexpipe profile --output {file}` makes one."
        ) from None
    except (msgspec.ValidationError, msgspec.DecodeError) as error:
        raise ConfigError(f"{file} is no profile of this version ({error}); measure it again.") from None


def write_profile(profile: ModelProfile, file: Path) -> None:
    """Write a profile for :func:`read_profile`; who reads meanwhile finds the old or the new one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=file.parent)
    with os.fdopen(descriptor, "wb") as out:
        out.write(msgspec.json.format(msgspec.json.encode(profile), indent=2) + b"\n")
    Path(temporary).rename(file)


def cache_file(path: Path, *, dtype: str, device: str, num_threads: int) -> Path:
    """Where the profile is kept. Named by all that its times depend on.

    Args: as of :func:`load_profile`.
    """
    key = [
        fingerprint(path),
        dtype,
        device_name(device),
        num_threads if device == "cpu" else 0,
        library_versions(),
    ]
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    return cache_home() / "profiles" / f"{path.name}-{dtype}-{device}-{digest}.json"


def fingerprint(path: Path) -> str:
    """Of a model's configuration, and the names and shapes of its weights: their values do not change its speed."""
    digest = hashlib.sha256((path / "config.json").read_bytes())
    for name, tensor in sorted(read_tensor_index(path).items()):
        digest.update(f"{name} {tensor.shape} {tensor.dtype}\n".encode())
    return digest.hexdigest()[:16]


def device_name(device: str) -> str:
    """The kind of this node's ``device`` ('cpu' or 'cuda'): the processor's name and number of cores, or the name of
    the first GPU; just 'cuda' where the driver does not tell it."""
    if device == "cpu":
        return f"{_cpu_model()}, {os.cpu_count()} cores"
    return gpu_name() or device


@lru_cache
def gpu_name() -> str | None:
    """The first GPU's name as the driver tells it; None where there is no GPU."""
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        names = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")
    except (OSError, subprocess.CalledProcessError):
        return None
    return names[0].strip() or None


@lru_cache
def library_versions() -> dict[str, str]:
    """Of what a step's time depends on: torch, transformers, and a digest of our kernels' sources."""
    digest = hashlib.sha256()
    for source in sorted((*_KERNELS.glob("*.py"), *_KERNELS.glob("csrc/*"))):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return {name: importlib.metadata.version(name) for name in _PACKAGES} | {"kernels": digest.hexdigest()[:12]}


def yield_to_others(parent: int) -> None:
    """Give this process the lowest priority, and let it end when its parent ``parent`` does."""
    os.nice(_LOWEST)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the line above
        sys.exit(1)


def _measure_once(path: Path, *, dtype: str, device: str, num_threads: int) -> ModelProfile:
    file = cache_file(path, dtype=dtype, device=device, num_threads=num_threads)
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = load_profile(path, dtype=dtype, device=device, num_threads=num_threads)
        if found is not None:
            return found
        options = ["--model", str(path), "--dtype", dtype, "--device", device, "--threads", str(num_threads)]
        process = subprocess.run(
            [sys.executable, "-c", _COMMAND, str(os.getpid()), *options],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            env=_environment(),
            check=False,
        )
        found = load_profile(path, dtype=dtype, device=device, num_threads=num_threads)
    if found is None:
        lines = process.stderr.strip().splitlines()
        raise ConfigError(f"profiling {path} ended with {process.returncode}: {' | '.join(lines[-3:])}")
    return found


def _environment() -> dict[str, str]:
    """Ours; but Ray hides GPUs from a Router, which has none of its own."""
    return {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES" or value}


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    found = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(found, platform.machine())
