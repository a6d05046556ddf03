"""Where profiles are kept, and measuring them in the background, with a stand-in for what measures."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from profile_cases import profile_of
from tiny_models import make_checkpoint

from flexpipe_serve.errors import ConfigError
from flexpipe_serve.model import profile_cache
from flexpipe_serve.model.profile_cache import (
    cache_file,
    load_profile,
    read_profile,
    start_profiling,
    write_profile,
)

MEASURED = profile_of(model="tiny")
_STAND_IN = """
import sys
from pathlib import Path
folder = Path({folder!r})
with (folder / "calls").open("a") as calls:
    print(*sys.argv[2:], file=calls)
if {fails}:
    sys.exit("there is no such device")
(folder / "done.json").rename({target!r})
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    make_checkpoint(folder, "llama")
    return folder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile_cache, "cache_home", lambda: tmp_path / "home")


def stand_in(model: Path, folder: Path, *, fails: bool = False) -> str:
    """Code that does what ``flexpipe profile`` does for the file system, and notes each call."""
    target = cache_file(model, dtype="float32", device="cpu", num_threads=2)
    write_profile(MEASURED, folder / "done.json")
    return _STAND_IN.format(folder=str(folder), target=str(target), fails=fails)


def test_what_is_written_is_found(model: Path) -> None:
    where = {"dtype": "float32", "device": "cpu", "num_threads": 2}
    assert load_profile(model, **where) is None
    write_profile(MEASURED, cache_file(model, **where))
    assert load_profile(model, **where) == MEASURED


def test_a_profile_is_of_what_its_times_depend_on(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def name(path: Path = model, **changes: object) -> str:
        return cache_file(path, **{"dtype": "float32", "device": "cpu", "num_threads": 2, **changes}).name

    same = name()
    assert name() == same
    other = tmp_path / "tiny"
    make_checkpoint(other, "llama", num_hidden_layers=3)
    different = {name(other), name(dtype="bfloat16"), name(num_threads=1), name(device="cuda")}
    assert name(device="cuda", num_threads=1) == name(device="cuda")  # threads do not matter there
    monkeypatch.setattr(profile_cache, "library_versions", lambda: {"torch": "another"})
    different.add(name())
    assert len(different | {same}) == 6


def test_other_weights_of_the_same_shapes_are_as_fast(model: Path, tmp_path: Path) -> None:
    other = tmp_path / "tiny"
    make_checkpoint(other, "llama", seed=1)
    assert profile_cache.fingerprint(other) == profile_cache.fingerprint(model)


def test_a_damaged_profile_counts_as_none(model: Path, tmp_path: Path) -> None:
    file = cache_file(model, dtype="float32", device="cpu", num_threads=2)
    write_profile(MEASURED, file)
    file.write_text(file.read_text().replace('"stage_s": ', '"stage_s": -'))
    assert load_profile(model, dtype="float32", device="cpu", num_threads=2) is None
    with pytest.raises(ConfigError, match="no profile of this version"):
        read_profile(file)
    with pytest.raises(ConfigError, match="flexpipe profile --output"):
        read_profile(tmp_path / "missing.json")


def test_it_is_measured_once(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile_cache, "_COMMAND", stand_in(model, tmp_path))
    futures = [start_profiling(model, dtype="float32", device="cpu", num_threads=2) for _ in range(3)]
    assert [future.result(120) for future in futures] == [MEASURED] * 3
    (call,) = (tmp_path / "calls").read_text().splitlines()
    assert call == f"--model {model} --dtype float32 --device cpu --threads 2"


def test_a_failure_says_what_the_command_said(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile_cache, "_COMMAND", stand_in(model, tmp_path, fails=True))
    with pytest.raises(ConfigError, match="ended with 1: there is no such device"):
        start_profiling(model, dtype="float32", device="cpu", num_threads=2).result(120)


def test_reading_profiles_needs_no_torch(model: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from flexpipe_serve.model.profile_cache import load_profile;"
        f"load_profile(Path({str(model)!r}), dtype='float32', device='cpu', num_threads=2);"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_measuring_yields_to_others_and_ends_with_its_parent() -> None:
    child = (
        "import os, signal; from flexpipe_serve.model.profile_cache import yield_to_others; yield_to_others(int({}));"
        "print(os.nice(0), flush=True); signal.pause()"
    )
    parent = (
        "import os, signal, subprocess, sys;"
        f"subprocess.Popen([sys.executable, '-c', {child!r}.format(os.getpid())]); signal.pause()"
    )
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    niceness = int(process.stdout.readline())
    assert niceness == 19
    process.send_signal(signal.SIGKILL)
    process.wait()
    # Ends when the child does: it holds the pipe's other end.
    assert process.stdout.read() == ""


def test_gpus_that_ray_hides_from_the_router_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "CUDA_VISIBLE_DEVICES" not in profile_cache._environment()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert profile_cache._environment()["CUDA_VISIBLE_DEVICES"] == "1"
