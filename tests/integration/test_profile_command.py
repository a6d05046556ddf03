"""``flexpipe profile`` on a small model, with all its parts: real stage processes, the Router's own loop."""

from pathlib import Path
from typing import ClassVar

import pytest

from flexpipe_serve.cli import main
from flexpipe_serve.kv.domain import DomainFolder
from flexpipe_serve.model import profile_cache
from flexpipe_serve.model.profile_cache import read_profile
from flexpipe_serve.model.source import load_spec


class _NotedFolder(DomainFolder):
    """Tells where it was."""

    paths: ClassVar[list[Path]] = []

    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.paths.append(self.path)


def test_profile(
    six_layers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(profile_cache, "cache_home", lambda: tmp_path / "home")
    command = ["profile", "--model", str(six_layers), "--device", "cpu", "--threads", "1"]
    output = tmp_path / "out" / "profile.json"
    for module in ("profiling", "profile_hop"):
        monkeypatch.setattr(f"flexpipe_serve.model.{module}.DomainFolder", _NotedFolder)
    assert main([*command, "--output", str(output)]) == 0
    assert len(_NotedFolder.paths) == 2
    assert not any(path.exists() for path in _NotedFolder.paths)
    printed = capsys.readouterr().out
    profile = read_profile(output)
    spec = load_spec(six_layers)

    assert profile.layer.counts[0] == 1
    assert profile.layer.counts[-1] == 512
    assert 0 < profile.layer.at(1) < profile.layer.at(512) < 1.0
    assert 0 < profile.hop_s < 1
    assert 0 < profile.step_s < 1
    assert profile.load_bytes_per_s > 1e5
    assert 0 < profile.error_mean <= profile.error_max
    assert profile.num_layers == len(profile.layer_bytes) == spec.num_layers
    assert all(num_bytes >= spec.layer_bytes(0, "float32") for num_bytes in profile.layer_bytes), "random: no few bits"
    assert "hop from process to process" in printed
    assert f"{profile.num_measured} other steps" in printed

    # The second time nothing is measured.
    monkeypatch.setattr("flexpipe_serve.model.profiling.profile_model", None)
    assert main([*command, "--output", str(output)]) == 0
    assert read_profile(output) == profile
    found = profile_cache.load_profile(six_layers, dtype="float32", device="cpu", num_threads=1)
    assert found == profile


def test_what_cannot_be_measured_is_told(six_layers: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", "--model", str(six_layers), "--threads", "0"]) == 1
    assert "--threads is 0" in capsys.readouterr().err
    assert main(["profile", "--model", "./nowhere"]) == 1
    assert "no such folder" in capsys.readouterr().err
