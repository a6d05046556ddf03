"""The files of the host cache: what is read is what was written, or nothing; and who makes room for whom."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flexpipe_serve.config import ServeArgs, parse
from flexpipe_serve.errors import ConfigError
from flexpipe_serve.kernels.huge_pages import empty_in_huge_pages
from flexpipe_serve.kv.domain import DomainFolder
from flexpipe_serve.kv.file_lock import close_shared, open_shared
from flexpipe_serve.placement.host_cache import FREE_SHARE, HostCache

CPU = torch.device("cpu")
MIB = 1 << 20
DTYPES = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
"""And integers of their size: NaN equals nothing."""


def nothing() -> None: ...


def bits(weights: dict[str, torch.Tensor] | None) -> dict[str, tuple[torch.dtype, list[object]]] | None:
    if weights is None:
        return None
    return {name: (w.dtype, [*w.shape, w.view(DTYPES[w.dtype]).tolist()]) for name, w in weights.items()}


def make(num_bytes: int = 1000, *, seed: int = 0) -> dict[str, torch.Tensor]:
    return {"w": torch.randn(num_bytes // 4, generator=torch.Generator().manual_seed(seed))}


class Shelf:
    """A folder of caches of one key, on a machine with as much memory as the test says."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.available = 1 << 30

    def cache(self, *, key: str = "key", max_bytes: int | None = None) -> HostCache:
        return HostCache(self.folder, key=key, max_bytes=max_bytes, available_bytes=lambda: self.available)

    def parts(self) -> set[str]:
        return {path.name.partition(".")[0] for path in self.folder.glob("*.weights")}

    def path(self, part: str) -> Path:
        (path,) = self.folder.glob(f"{part}.*.weights")
        return path

    def open_files(self) -> list[str]:
        found = []
        for link in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # the one that lists them
                found.append(os.readlink(link))
        return [target for target in found if target.startswith(str(self.folder))]

    def age(self, part: str, *, seconds: float) -> None:
        """As if it had been used last so long ago."""
        at = time.time() - seconds
        os.utime(self.path(part), (at, at))


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Shelf(tmp_path)


_tensors = st.dictionaries(
    st.text(st.characters(codec="utf-8", exclude_characters="\x00"), min_size=1, max_size=12),
    st.tuples(st.sampled_from(list(DTYPES)), st.lists(st.integers(1, 9), min_size=1, max_size=3)),
    min_size=1,
    max_size=5,
)


@given(shapes=_tensors, seed=st.integers(0, 1 << 30))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_read_was_written(shelf: Shelf, shapes: dict[str, tuple[torch.dtype, list[int]]], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, (dtype, shape) in shapes.items():
        integers = DTYPES[dtype]
        limits = torch.iinfo(integers)
        drawn = torch.randint(limits.min, limits.max, shape, generator=generator, dtype=integers)
        weights[name] = drawn.view(dtype)  # any bits: also NaN of all kinds
    cache = shelf.cache(key=uuid.uuid4().hex)
    assert cache.write("part", weights, between=nothing)
    assert bits(cache.read("part", device=CPU, between=nothing)) == bits(weights)
    assert cache.use().used_bytes == shelf.path("part").stat().st_size


def test_tensors_of_many_pieces_and_of_any_layout(shelf: Shelf) -> None:
    weights = {
        "large": torch.randn(2 * MIB + 77),
        "transposed": torch.randn(640, 1111).t(),
        "odd": torch.randn(3, 7).to(torch.bfloat16),
        "expanded": torch.randn(1, 5).expand(4, 5),
    }
    pauses: list[None] = []
    cache = shelf.cache()
    assert cache.write("part", weights, between=lambda: pauses.append(None))
    assert len(pauses) >= 6, "it can be paused every few MB"
    pauses.clear()
    found = cache.read("part", device=CPU, between=lambda: pauses.append(None))
    assert len(pauses) >= 5
    assert found is not None
    assert all(torch.equal(found[name], weights[name]) for name in weights)
    assert all(tensor.is_contiguous() for tensor in found.values())
    assert not any(".weights" in line for line in Path("/proc/self/maps").read_text().splitlines()), "nothing is mapped"
    assert shelf.open_files() == []


@given(data=st.data())
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_file_is_no_file(shelf: Shelf, data: st.DataObject) -> None:
    weights = {"a": torch.arange(40.0), "b": torch.ones(3, 5, dtype=torch.bfloat16)}
    cache = shelf.cache()
    assert cache.write("part", weights, between=nothing)
    path = shelf.path("part")
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans(), label="cut"):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        position = data.draw(st.integers(0, len(content) - 1))
        content[position] ^= data.draw(st.integers(1, 255))
        # Between header and data lie bytes without a meaning.
    path.write_bytes(content)
    found = cache.read("part", device=CPU, between=nothing)
    assert found is None or bits(found) == bits(weights)
    if found is None:
        assert "part" not in cache, "it is made anew"
    assert cache.write("part", weights, between=nothing)
    assert bits(cache.read("part", device=CPU, between=nothing)) == bits(weights)


@pytest.mark.parametrize("change", ["empty", "short", "zeros", "swapped pages"])
def test_damage_of_each_kind_is_seen(shelf: Shelf, change: str) -> None:
    cache = shelf.cache()
    assert cache.write("part", make(100_000), between=nothing)
    path = shelf.path("part")
    content = path.read_bytes()
    damaged = {
        "empty": b"",
        "short": content[:-1],
        "zeros": content[:50_000] + bytes(1000) + content[51_000:],
        "swapped pages": bytes(4096) + content[4096:],
    }[change]
    path.write_bytes(damaged)
    assert cache.read("part", device=CPU, between=nothing) is None
    assert not path.exists()
    assert cache.use().num_misses == 1


def test_of_two_writers_one_wins_and_readers_see_whole_parts_only(shelf: Shelf) -> None:
    first, second = shelf.cache(), shelf.cache()
    weights = make(6 * MIB)
    in_the_middle, go_on = threading.Event(), threading.Event()

    def pause() -> None:
        in_the_middle.set()
        assert go_on.wait(60)

    writer = threading.Thread(target=lambda: first.write("part", weights, between=pause))
    writer.start()
    assert in_the_middle.wait(60)
    assert second.read("part", device=CPU, between=nothing) is None
    assert not second.write("part", weights, between=nothing), "somebody is at it"
    assert second.use().used_bytes > 6 * MIB, "what is being written counts in full"
    go_on.set()
    writer.join()
    assert second.write("part", weights, between=nothing), "it is there"
    assert bits(second.read("part", device=CPU, between=nothing)) == bits(weights)
    assert [path.name for path in shelf.folder.glob("*.new")] == []


def test_many_threads_fill_and_read_at_once(shelf: Shelf) -> None:
    parts = {f"layer-{i}": make(300_000, seed=i) for i in range(4)}
    wrong: list[str] = []

    def work(seed: int) -> None:
        cache = shelf.cache()
        for i in range(12):
            name = f"layer-{(seed + i) % 4}"
            cache.write(name, parts[name], between=nothing)
            found = cache.read(name, device=CPU, between=nothing)
            if found is not None and not torch.equal(found["w"], parts[name]["w"]):
                wrong.append(name)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert shelf.parts() == set(parts)


def test_what_a_killed_writer_left_is_replaced(shelf: Shelf) -> None:
    cache = shelf.cache()
    (shelf.folder / "part.key.weights.new").write_bytes(bytes(MIB))
    (shelf.folder / "other.key.weights.new").write_bytes(bytes(MIB))
    assert cache.write("part", make(), between=nothing)
    assert list(shelf.folder.glob("*.new")) == []
    assert cache.read("part", device=CPU, between=nothing) is not None


def test_giving_up_leaves_nothing(shelf: Shelf) -> None:
    cache = shelf.cache()

    def give_up() -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        cache.write("part", make(3 * MIB), between=give_up)
    assert list(shelf.folder.glob("part*")) == []
    assert cache.write("part", make(3 * MIB), between=nothing)
    with pytest.raises(InterruptedError):
        cache.read("part", device=CPU, between=give_up)
    assert shelf.open_files() == []
    assert (cache.use().num_hits, cache.use().num_misses) == (0, 0)


def test_a_full_file_system_is_no_error(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = shelf.cache()

    def fail(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", fail)
        assert not cache.write("part", make(), between=nothing)
    assert list(shelf.folder.glob("part*")) == []
    assert cache.write("part", make(), between=nothing)


def test_the_longest_unused_make_room(shelf: Shelf) -> None:
    cache = shelf.cache(max_bytes=350_000)
    for i, part in enumerate(("a", "b", "c")):
        assert cache.write(part, make(100_000), between=nothing)
        shelf.age(part, seconds=1000 - i)
    assert cache.read("a", device=CPU, between=nothing) is not None  # used now
    assert cache.write("d", make(100_000), between=nothing)
    assert shelf.parts() == {"a", "c", "d"}
    assert cache.use().used_bytes <= 350_000


def test_what_was_used_lately_makes_no_room(shelf: Shelf) -> None:
    cache = shelf.cache(max_bytes=250_000)
    written = [part for part in "abcd" if cache.write(part, make(100_000), between=nothing)]
    assert written == ["a", "b"], "a model larger than the cache does not push itself out"
    shelf.age("a", seconds=1000)
    assert not cache.write("large", make(200_000), between=nothing)
    assert shelf.parts() == {"a", "b"}, "nothing is removed in vain"


@given(available=st.integers(0, 100_000), max_bytes=st.none() | st.integers(0, 20_000), data=st.data())
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_cache_keeps_to_its_limit(
    tmp_path_factory: pytest.TempPathFactory, available: int, max_bytes: int | None, data: st.DataObject
) -> None:
    shelf = Shelf(tmp_path_factory.mktemp("shelf"))
    cache = shelf.cache(max_bytes=max_bytes)
    for i in range(8):
        used = cache.use().used_bytes
        shelf.available = available - used  # what it takes is not free
        cache.write(f"part-{i}", make(data.draw(st.integers(4, 8000))), between=nothing)
        shelf.available = available - cache.use().used_bytes
        assert cache.use().used_bytes <= min(FREE_SHARE * available, available if max_bytes is None else max_bytes)
        for part in shelf.parts():
            if data.draw(st.booleans()):
                shelf.age(part, seconds=100)


def test_whoever_reads_a_removed_part_reads_on(shelf: Shelf) -> None:
    cache = shelf.cache()
    weights = make(6 * MIB)
    assert cache.write("part", weights, between=nothing)
    found = cache.read("part", device=CPU, between=lambda: shelf.path("part").unlink() if "part" in cache else None)
    assert bits(found) == bits(weights)


def test_weights_of_another_model_or_form_are_no_use(shelf: Shelf) -> None:
    assert shelf.cache(key="old").write("part", make(), between=nothing)
    being_written = shelf.folder / "layer-1.old.weights.new"
    fd = open_shared(being_written)
    cache = shelf.cache(key="new")
    assert shelf.parts() == set()
    assert being_written.exists()
    assert cache.read("part", device=CPU, between=nothing) is None
    close_shared(fd, being_written)


@pytest.fixture
def shm(tmp_path: Path) -> Iterator[DomainFolder]:
    with DomainFolder("test", root=tmp_path) as folder:
        yield folder


def test_the_cache_goes_with_the_folder(shm: DomainFolder) -> None:
    cache = HostCache(shm.path, key="key")
    assert cache.write("part", make(), between=nothing)
    shm.close()
    assert not shm.path.exists()


def test_large_pages_take_no_more_than_asked_for() -> None:
    def resident() -> int:
        return int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1]) * 1024

    before = resident()
    held = [empty_in_huge_pages((5 * MIB // 4 + 100, 3), torch.float32).fill_(1.0) for _ in range(10)]
    assert resident() - before < 1.05 * sum(tensor.nbytes for tensor in held) + MIB
    del held
    assert resident() - before < 2 * MIB, "it went back to the system"


@pytest.mark.parametrize(("given_size", "parsed"), [("2GiB", 2 << 30), (0, 0), ("0", 0), (None, None)])
def test_the_size_is_configured(given_size: object, parsed: int | None) -> None:
    assert parse(ServeArgs, {"host_cache": given_size}).host_cache == parsed


def test_a_wrong_size_is_refused() -> None:
    with pytest.raises(ConfigError, match="host_cache"):
        parse(ServeArgs, {"host_cache": -1})
