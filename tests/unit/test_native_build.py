"""Compiling the CPU kernels: once, by one of several processes, and never fatal."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from flexpipe_serve.kernels import native
from flexpipe_serve.kernels.native import NativeBuildError, build, native_library

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, and a process that has not loaded the kernels yet."""
    monkeypatch.setenv("FLEXPIPE_HOME", str(tmp_path))
    monkeypatch.setattr(native, "native_library", native_library.__wrapped__)
    return tmp_path / "native"


def fake_compiler(folder: Path, script: str) -> str:
    compiler = folder / "c++"
    compiler.write_text(f"#!/bin/sh\n{script}\n")
    compiler.chmod(0o755)
    return str(compiler)


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo a.cpp:1: error: no such thing >&2; exit 1", "ended with 1: a.cpp:1: error: no such thing"),
        ("exit 4", "ended with 4: no message"),
        ('case "$*" in *-E*) ;; *) for last; do :; done; echo rubbish > "$last";; esac', "cannot be loaded"),
    ],
)
def test_a_compiler_that_fails_is_one_warning(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, script: str, reason: str
) -> None:
    monkeypatch.setenv("CXX", fake_compiler(fresh.parent, script))
    with caplog.at_level(logging.WARNING):
        assert native.native_library() is None
    (record,) = caplog.records
    assert reason in record.getMessage()


def test_without_a_compiler_the_reason_says_so(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(NativeBuildError, match="no C\\+\\+ compiler; install"):
        build(fresh)


@needs_compiler
def test_two_processes_compile_once(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = fresh.parent / "csrc"
    sources.mkdir()
    (sources / "a.cpp").write_text("int f() { return 1; }")
    compiled = fresh.parent / "compiled"
    script = f'case "$*" in *-E*) ;; *) echo x >> {compiled}; sleep 0.5;; esac; exec g++ "$@"'
    monkeypatch.setenv("CXX", fake_compiler(fresh.parent, script))
    program = (
        "import sys, pathlib; from flexpipe_serve.kernels import native; native._SOURCES = pathlib.Path(sys.argv[1])"
    )
    command = [sys.executable, "-c", f"{program}; native.build(pathlib.Path(sys.argv[2]))", str(sources), str(fresh)]
    processes = [subprocess.Popen(command) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    assert len(list(fresh.glob("*.so"))) == 1
    assert compiled.read_text().split() == ["x"]
    assert sorted(file.suffix for file in fresh.iterdir()) == ["", ".so"], "nothing is left but lock and library"


@needs_compiler
def test_other_sources_or_flags_are_another_library(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = fresh.parent / "csrc"
    sources.mkdir()
    (sources / "a.cpp").write_text("int f() { return 1; }")
    monkeypatch.setattr(native, "_SOURCES", sources)
    first = build(fresh)
    assert build(fresh) == first
    (sources / "a.cpp").write_text("int f() { return 2; }")
    assert build(fresh) != first
