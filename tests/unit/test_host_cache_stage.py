"""Weights out of the host cache are those of the checkpoint, bit by bit; and stages fill it and take from it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from stage_harness import Harness, harness
from tiny_models import CPU, Pipeline, make_checkpoint

from flexpipe_serve.kernels.linear import available_kinds
from flexpipe_serve.kernels.registry import get_attention_backend
from flexpipe_serve.kv.domain import DomainFolder
from flexpipe_serve.model.checkpoint import Checkpoint
from flexpipe_serve.model.source import load_spec
from flexpipe_serve.model.stage_model import StageModel
from flexpipe_serve.pipeline.cache_filler import CacheFiller
from flexpipe_serve.placement.host_cache import HostCache

TOKENS = [9, 4, 77, 23, 5, 61]
KINDS = available_kinds(CPU, torch.float32)
LAYERS = range(4)


def nothing() -> None: ...


def make_stage(folder: Path, *, linear: str = "plain", dtype: torch.dtype = torch.float32) -> StageModel:
    attention = get_attention_backend("auto" if dtype is torch.float32 else "torch", device=CPU, dtype=dtype)
    return StageModel(load_spec(folder), device=CPU, dtype=dtype, attention=attention, linear=linear)


def logits(folder: Path, stage: StageModel, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    pipeline = Pipeline(load_spec(folder), [(stage, LAYERS)], attention=stage._attention, dtype=dtype)
    return pipeline.step([(0, TOKENS)])[0]


@pytest.fixture
def no_checkpoint(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Called, it makes reading tensors of a checkpoint an error."""

    def fail(*_: object, **__: object) -> Any:
        raise AssertionError("the checkpoint was read")

    return lambda: monkeypatch.setattr(Checkpoint, "read", fail)


@pytest.fixture(
    scope="module", params=["llama-tied", "llama-biases", "qwen3", "phi3-partial-rotary", "olmo2", "qwen3_moe"]
)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    make_checkpoint(folder, request.param)
    return folder


@pytest.mark.parametrize("linear", KINDS)
def test_bits_are_those_of_the_checkpoint(
    checkpoint: Path, linear: str, tmp_path: Path, no_checkpoint: Callable[[], None]
) -> None:
    loaded = make_stage(checkpoint, linear=linear)
    loaded.use_cache(HostCache(tmp_path, key=loaded.weights_key))
    loaded.load(LAYERS, embedding=True, head=True)
    expected = logits(checkpoint, loaded)
    loaded.fill_cache(between=nothing)

    no_checkpoint()
    stage = make_stage(checkpoint, linear=linear)
    cache = HostCache(tmp_path, key=stage.weights_key)
    stage.use_cache(cache)
    for part in reversed(LAYERS):
        stage.load([part])
    stage.load((), head=True)
    stage.load((), embedding=True)
    assert cache.use().num_misses == 0
    assert cache.use().num_parts == 6
    assert stage.sizes.total == loaded.sizes.total
    assert torch.equal(logits(checkpoint, stage), expected)
    for index in LAYERS:
        ours, theirs = stage._layers[index].weights(), loaded._layers[index].weights()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("name", ["llama-tied", "qwen3_moe"])
def test_half_precision_is_kept_as_it_is(name: str, tmp_path: Path, no_checkpoint: Callable[[], None]) -> None:
    checkpoint = tmp_path / "model"
    make_checkpoint(checkpoint, name)
    loaded = make_stage(checkpoint, dtype=torch.bfloat16)
    loaded.use_cache(HostCache(tmp_path, key=loaded.weights_key))
    loaded.load(LAYERS, embedding=True, head=True)
    loaded.fill_cache(between=nothing)
    no_checkpoint()
    stage = make_stage(checkpoint, dtype=torch.bfloat16)
    stage.use_cache(HostCache(tmp_path, key=stage.weights_key))
    stage.load(LAYERS, embedding=True, head=True)
    assert torch.equal(logits(checkpoint, stage, torch.bfloat16), logits(checkpoint, loaded, torch.bfloat16))


def test_tied_plain_ends_are_one_matrix_in_the_cache_too(tmp_path: Path, no_checkpoint: Callable[[], None]) -> None:
    make_checkpoint(tmp_path / "model", "llama-tied")
    cache_folder = tmp_path / "cache"
    cache_folder.mkdir()
    last = make_stage(tmp_path / "model")
    last.use_cache(HostCache(cache_folder, key=last.weights_key))
    last.load((), head=True)
    last.fill_cache(between=nothing)
    spec = load_spec(tmp_path / "model")
    assert sum(path.stat().st_size for path in cache_folder.glob("*.weights")) < 1.2 * spec.embedding_bytes("float32")
    no_checkpoint()
    both = make_stage(tmp_path / "model")
    both.use_cache(HostCache(cache_folder, key=both.weights_key))
    both.load((), embedding=True, head=True)
    assert both.sizes.total == spec.head_bytes("float32")


def test_a_damaged_part_comes_from_the_checkpoint_and_is_kept_anew(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "model", "llama")
    cache_folder = tmp_path / "cache"
    cache_folder.mkdir()
    stage = make_stage(tmp_path / "model", linear=KINDS[0])
    stage.use_cache(HostCache(cache_folder, key=stage.weights_key))
    stage.load(LAYERS, embedding=True, head=True)
    expected = logits(tmp_path / "model", stage)
    stage.fill_cache(between=nothing)
    for path in cache_folder.glob("*.weights"):
        with open(path, "r+b") as file:
            file.seek(-300, 2)
            file.write(b"\x55" * 300)
    stage.keep(())
    stage.load(LAYERS, embedding=True, head=True)
    assert torch.equal(logits(tmp_path / "model", stage), expected)
    assert list(cache_folder.glob("*.weights")) == []
    stage.fill_cache(between=nothing)
    assert len(list(cache_folder.glob("*.weights"))) == 6


def test_the_key_names_weights_and_form(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "llama", seed=0)
    keys = [make_stage(tmp_path, linear=kind).weights_key for kind in KINDS]
    keys.append(make_stage(tmp_path, dtype=torch.bfloat16).weights_key)
    assert make_stage(tmp_path, linear=KINDS[0]).weights_key == keys[0]
    (tmp_path / "model.safetensors").unlink()
    make_checkpoint(tmp_path, "llama", seed=1)
    keys.append(make_stage(tmp_path, linear=KINDS[0]).weights_key)
    assert len(set(keys)) == len(keys)


class Written:
    """Counts the parts that stages have put into caches."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._parts = threading.Semaphore(0)
        original = HostCache.write

        def write(cache: HostCache, part: str, weights: Mapping[str, torch.Tensor], **options: Any) -> bool:
            result = original(cache, part, weights, **options)
            if result:
                self._parts.release()
            return result

        monkeypatch.setattr(HostCache, "write", write)

    def wait(self, num_parts: int) -> None:
        for _ in range(num_parts):
            assert self._parts.acquire(timeout=60)


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> Written:
    return Written(monkeypatch)


@pytest.fixture
def stages(tmp_path: Path, written: Written) -> Iterator[Harness]:
    """Two stages whose node's cache is full."""
    make_checkpoint(tmp_path, "llama")
    with harness(tmp_path, host_cache_bytes=None) as stages:
        stages.start(("stage-0", 0, 2), ("stage-1", 2, 4))
        written.wait(6)
        yield stages


def test_layers_that_move_come_from_the_cache(stages: Harness, no_checkpoint: Callable[[], None]) -> None:
    alone = stages.sequence([5, 9, 3], num_tokens=8)
    stages.step(1, [alone])
    no_checkpoint()
    stages.add(2, ("stage-0", 0, 3), ("stage-1", 3, 4))
    again = stages.sequence([5, 9, 3], num_tokens=8)
    stages.step(2, [again])
    assert (again.tokens, again.logprobs) == (alone.tokens, alone.logprobs)
    report = stages.stages["stage-0"].report()
    assert report.host_cache is not None
    assert (report.host_cache.num_hits, report.host_cache.num_parts) == (1, 6)
    assert 0 < report.host_cache.used_bytes <= report.host_cache.limit_bytes


def test_the_cache_outlives_a_stage(stages: Harness, no_checkpoint: Callable[[], None]) -> None:
    no_checkpoint()
    for name in ("stage-0", "stage-1"):
        stages.stop(name)
    stages.start(("stage-2", 0, 4), epoch=2)
    report = stages.stages["stage-2"].report()
    assert report.host_cache is not None
    assert (report.host_cache.num_hits, report.host_cache.num_misses) == (6, 0)
    sequence = stages.sequence([5, 9, 3], num_tokens=8)
    stages.step(2, [sequence])


def test_pipelines_of_an_application_share_the_cache(stages: Harness, no_checkpoint: Callable[[], None]) -> None:
    no_checkpoint()
    of_first = stages.setup.domain_key
    with harness(
        Path(stages.setup.model_path), host_cache_bytes=None, domain_key=f"{of_first}/second", host_cache_key=of_first
    ) as second:
        second.start(("stage-0", 0, 4))
        report = second.stages["stage-0"].report()
        assert report.host_cache is not None
        assert report.host_cache.num_hits == 6
        assert not list(second.folder.path.glob("*.weights"))
    assert len(list(stages.folder.path.glob("*.weights"))) == 6, "it goes with the last pipeline only"


def test_without_a_cache_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_checkpoint(tmp_path, "llama")
    monkeypatch.setattr(HostCache, "__init__", None)
    with harness(tmp_path, host_cache_bytes=0) as stages:
        stages.start(("stage-0", 0, 4))
        assert stages.stages["stage-0"].report().host_cache is None
        assert not any("weights" in path.name or "cache" in path.name for path in stages.folder.path.iterdir())


def test_a_stage_that_ends_stops_filling_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_checkpoint(tmp_path, "llama")
    filling = threading.Event()
    original = HostCache.write

    def write_slowly(cache: HostCache, part: str, weights: Any, *, between: Callable[[], None]) -> bool:
        def wait() -> None:
            filling.set()
            while True:  # until the stage's end interrupts it
                between()

        return original(cache, part, weights, between=wait)

    monkeypatch.setattr(HostCache, "write", write_slowly)
    with harness(tmp_path, host_cache_bytes=None) as stages:
        stages.start(("stage-0", 0, 4))
        assert filling.wait(60)
        assert len(list(stages.folder.path.glob("*.new"))) == 1
        stages.stop("stage-0")
        assert list(stages.folder.path.glob("*.weights*")) == []


def test_a_cache_that_cannot_be_filled_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tried = threading.Semaphore(0)

    class Model:
        def fill_cache(self, *, between: Callable[[], None]) -> None:
            tried.release()
            raise RuntimeError("broken")

    filler = CacheFiller(Model(), folder=Path("/"))  # type: ignore[arg-type]
    for _ in range(2):
        filler.fill()
        assert tried.acquire(timeout=60), "it tries again with the next weights"
    filler.close()
    assert "the host cache is not filled" in caplog.text


def test_the_last_stage_out_takes_the_cache_along(tmp_path: Path, written: Written) -> None:
    make_checkpoint(tmp_path, "llama")
    with harness(tmp_path, host_cache_bytes=None) as stages:
        stages.start(("stage-0", 0, 4))
        written.wait(6)
        assert isinstance(stages.folder, DomainFolder)
        assert len(list(stages.folder.path.glob("*.weights"))) == 6
    assert not stages.folder.path.exists()
