"""A domain's folder of shared memory: real processes, real kills."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from flexpipe_serve.kv import domain
from flexpipe_serve.kv.domain import SHM_ROOT, DomainFolder, sweep_stale
from flexpipe_serve.kv.segment import BlockShape, SharedSegment

SHAPE = BlockShape(block_size=16, num_kv_heads=3, head_dim=64, dtype=torch.float32)


@pytest.fixture
def shm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A private folder in real shared memory."""
    folder = SHM_ROOT / f"flexpipe-test-{os.getpid()}-{threading.get_ident()}"
    folder.mkdir()
    yield folder
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    folder.rmdir()


USER = """
    import sys
    from pathlib import Path

    import torch

    from flexpipe_serve.kv.domain import DomainFolder
    from flexpipe_serve.kv.segment import BlockShape, SharedSegment

    folder = DomainFolder("app", root=Path(sys.argv[1]))
    shape = BlockShape(block_size=16, num_kv_heads=3, head_dim=64, dtype=torch.float32)
    segment = None
    print("ready", flush=True)
    for line in sys.stdin:
        match line.split():
            case ["open", num_blocks]:
                path = folder.segment_path(7)
                segment = SharedSegment(path, shape=shape, max_blocks=100)
                segment.resize(int(num_blocks))
            case ["write", value]:
                segment.tensor[2] = float(value)
            case ["read"]:
                print(segment.tensor[2].min().item(), segment.tensor[2].max().item(), flush=True)
                continue
            case ["close"]:
                folder.close()
        print("ok", flush=True)
"""


class User:
    """A process that uses the domain folder of ``app``."""

    def __init__(self, root: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(USER), str(root)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._answer() == "ready"

    def ask(self, command: str) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        return self._answer()

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.communicate()

    def _answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()


def test_segments_of_the_dead_are_swept_and_no_others(shm: Path) -> None:
    with DomainFolder("app", root=shm) as folder:
        dead, living = User(shm), User(shm)
        try:
            dead.ask("open 10")
            mine = SharedSegment(folder.segment_path(3, stage="stage-1"), shape=SHAPE, max_blocks=100)
            assert folder.sweep_segments() == []
            dead.kill()
            assert folder.sweep_segments() == [folder.segment_path(7)]
            living.ask("open 10")
            assert folder.sweep_segments() == []
            mine.close()
        finally:
            dead.kill()
            living.kill()


def test_kv_outlives_a_killed_process_until_the_last_one_dies(shm: Path) -> None:
    first, second = User(shm), User(shm)
    try:
        first.ask("open 10")
        first.ask("write 42")
        second.ask("open 10")
        first.kill()
        assert sweep_stale(root=shm) == [], "the second process still uses the folder"
        assert second.ask("read") == "42.0 42.0"
        third = User(shm)
        third.ask("open 10")
        third.ask("write 43")
        assert second.ask("read") == "43.0 43.0"
        third.kill()
    finally:
        first.kill()
        second.kill()
    (folder,) = shm.iterdir()
    assert (folder / "layer-7.kv").stat().st_blocks * 512 == 10 * SHAPE.num_bytes
    assert sweep_stale(root=shm) == [folder]
    assert list(shm.iterdir()) == []
    assert sweep_stale(root=shm) == []


def test_last_user_out_removes_the_folder(shm: Path) -> None:
    first, second = DomainFolder("app", root=shm), DomainFolder("app", root=shm)
    assert first.path == second.path
    SharedSegment(first.segment_path(0), shape=SHAPE, max_blocks=4)
    first.close()
    first.close()
    assert second.path.exists()
    with DomainFolder("another", root=shm) as other:
        assert other.path != second.path
    second.close()
    assert list(shm.iterdir()) == []


def test_users_that_come_and_go_at_once_never_meet_a_dead_folder(shm: Path) -> None:
    errors: list[BaseException] = []

    def use(number: int) -> None:
        try:
            for _ in range(200):
                with DomainFolder("app", root=shm) as folder:
                    mine = folder.path / f"file-{number}"
                    mine.write_text("x")
                    assert mine.exists()
                    if number == 0:
                        sweep_stale(root=shm)
                    assert mine.read_text() == "x"
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=use, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert list(shm.iterdir()) == []


def test_sweep_spares_a_folder_that_was_left_and_joined_again_meanwhile(
    shm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = DomainFolder("app", root=shm)
    joined: list[DomainFolder] = []
    open_lock = domain._open_lock

    def open_lock_then_change_hands(folder: Path) -> int:
        fd = open_lock(folder)
        if not joined:
            monkeypatch.setattr(domain, "_open_lock", open_lock)
            old.close()
            joined.append(DomainFolder("app", root=shm))
        return fd

    monkeypatch.setattr(domain, "_open_lock", open_lock_then_change_hands)
    assert sweep_stale(root=shm) == []
    assert joined[0].path.exists()
    joined[0].close()
    assert list(shm.iterdir()) == []


def test_folder_joined_while_it_is_removed_lives_on(shm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = DomainFolder("app", root=shm)
    joined: list[DomainFolder] = []
    unlink = os.unlink

    def unlink_then_join(path: Path) -> None:
        unlink(path)
        monkeypatch.undo()
        joined.append(DomainFolder("app", root=shm))

    monkeypatch.setattr(os, "unlink", unlink_then_join)
    old.close()
    assert sweep_stale(root=shm) == []
    assert joined[0].path.exists()
    joined[0].close()


def test_sweep_leaves_what_is_not_ours(shm: Path) -> None:
    file = shm / f"flexpipe-{os.getuid()}-file"
    file.write_text("")
    foreign = shm / f"flexpipe-{os.getuid() + 1}-0123"
    foreign.mkdir()
    assert sweep_stale(root=shm) == []
    assert file.exists()
    assert foreign.exists()


def test_folder_of_another_user_is_refused(shm: Path) -> None:
    if os.getuid() != 0:
        pytest.skip("giving a folder to another user takes root")
    with DomainFolder("app", root=shm) as folder:
        path = folder.path
    path.mkdir()
    os.chown(path, 12345, -1)
    with pytest.raises(PermissionError, match="belongs to user 12345"):
        DomainFolder("app", root=shm)
    assert sweep_stale(root=shm) == []


def test_domain_needs_no_torch() -> None:
    code = "import sys, flexpipe_serve.kv.domain; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
