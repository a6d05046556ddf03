"""With native kernels a token's bits depend on its own sequence alone, through the whole model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_models import CPU, Pipeline, make_checkpoint, make_pipeline

from flexpipe_serve.kernels.linear import available_kinds
from flexpipe_serve.kernels.registry import get_attention_backend

if "native" not in available_kinds(CPU, torch.float32):
    pytest.skip("the CPU kernels cannot be compiled here (see the warning)", allow_module_level=True)

TOKENS = torch.randint(3, 131, (2, 60), generator=torch.Generator().manual_seed(0)).tolist()


@pytest.fixture(scope="module", params=["llama-biases", "qwen3", "phi3-partial-rotary"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    make_checkpoint(folder, request.param)
    return folder


@pytest.fixture(params=[1, 2, 3])
def num_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def native_pipeline(folder: Path) -> Pipeline:
    attention = get_attention_backend("native", device=CPU, dtype=torch.float32)
    return make_pipeline(folder, boundaries=(1, 3), linear="native", attention=attention)


def test_chunks_batch_and_threads_do_not_change_bits(checkpoint: Path, num_threads: int) -> None:
    first, second = TOKENS
    alone = native_pipeline(checkpoint)
    expected = [alone.step([(0, first)])[0], alone.step([(1, second)])[0]]

    mixed = native_pipeline(checkpoint)
    pieces: list[list[torch.Tensor]] = [[], []]
    done = [0, 0]
    for counts in [(17, 1), (1, 30), (40, 1), (1, 1), (1, 27)]:
        chunks = [(s, TOKENS[s][done[s] : done[s] + count]) for s, count in enumerate(counts)]
        for s, logits in enumerate(mixed.step(chunks)):
            pieces[s].append(logits)
            done[s] += counts[s]
    assert done == [60, 60]
    assert all(torch.equal(torch.cat(parts), whole) for parts, whole in zip(pieces, expected, strict=True))


def test_threads_do_not_change_bits(checkpoint: Path, num_threads: int) -> None:
    many = native_pipeline(checkpoint).step([(0, TOKENS[0])])[0]
    torch.set_num_threads(1)
    assert torch.equal(native_pipeline(checkpoint).step([(0, TOKENS[0])])[0], many)
