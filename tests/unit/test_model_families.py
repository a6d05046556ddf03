"""Every served model type against transformers' own forward, from a small random checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import CONFIGS, CPU, make_checkpoint, make_pipeline, reference_logits
from transformers import PreTrainedModel

from flexpipe_serve.kernels.linear import available_kinds
from flexpipe_serve.kernels.registry import get_attention_backend
from flexpipe_serve.model.support import FAMILIES

KINDS = available_kinds(CPU, torch.float32)
needs_native = pytest.mark.skipif("native" not in KINDS, reason="the CPU kernels cannot be compiled here")
TOLERANCE = 1e-4
LONGROPE_LIMIT = {"phi3-longrope": 48}


@pytest.fixture(scope="module", params=sorted(CONFIGS))
def checkpoint(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, PreTrainedModel]:
    folder = tmp_path_factory.mktemp("checkpoint")
    return request.param, folder, make_checkpoint(folder, request.param)


def test_every_family_has_a_checkpoint() -> None:
    assert {config["model_type"] for config in CONFIGS.values()} == set(FAMILIES)


@pytest.mark.parametrize(
    ("boundaries", "linear", "attention"),
    [
        *((boundaries, "plain", "torch") for boundaries in ((), (1,), (2,), (3,), (1, 2, 3))),
        pytest.param((2,), "native", "native", marks=needs_native),
        pytest.param((2,), "native", "torch", marks=needs_native),
    ],
)
def test_ragged_batches_agree_with_transformers(
    checkpoint: tuple[str, Path, PreTrainedModel], boundaries: tuple[int, ...], linear: str, attention: str
) -> None:
    """Chunked prefills and decodes of three sequences mixed in every step."""
    name, folder, model = checkpoint
    pipeline = make_pipeline(
        folder,
        boundaries=boundaries,
        linear=linear,
        attention=get_attention_backend(attention, device=CPU, dtype=torch.float32),
        max_model_len=LONGROPE_LIMIT.get(name),
    )
    generator = torch.Generator().manual_seed(1)
    tokens = [torch.randint(3, 131, (length,), generator=generator).tolist() for length in (19, 9, 30)]
    schedule = [
        [(0, 7), (2, 5)],
        [(1, 1), (0, 1), (2, 9)],
        [(0, 3), (1, 5), (2, 1)],
        [(2, 1), (0, 1), (1, 1)],
        [(1, 2), (2, 14), (0, 7)],
    ]
    done = [0, 0, 0]
    logits: list[list[torch.Tensor]] = [[], [], []]
    for step in schedule:
        chunks = [(sequence, tokens[sequence][done[sequence] : done[sequence] + count]) for sequence, count in step]
        for (sequence, chunk), out in zip(chunks, pipeline.step(chunks), strict=True):
            logits[sequence].append(out)
            done[sequence] += len(chunk)
    assert done == [19, 9, 30]
    for sequence in range(3):
        torch.testing.assert_close(
            torch.cat(logits[sequence]), reference_logits(model, tokens[sequence]), atol=TOLERANCE, rtol=0
        )


def test_greedy_continuation_agrees_with_transformers(checkpoint: tuple[str, Path, PreTrainedModel]) -> None:
    name, folder, model = checkpoint
    pipeline = make_pipeline(
        folder,
        boundaries=(2,),
        linear=KINDS[0],
        attention=get_attention_backend("auto", device=CPU, dtype=torch.float32),
        max_model_len=LONGROPE_LIMIT.get(name),
    )
    prompt = [5, 17, 99, 42, 7]
    expected = model.generate(
        torch.tensor([prompt]), max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0
    )[0].tolist()
    tokens = list(prompt)
    (logits,) = pipeline.step([(0, prompt)])
    for _ in range(24):
        tokens.append(int(logits[-1].argmax()))
        (logits,) = pipeline.step([(0, tokens[-1:])])
    assert tokens == expected


@pytest.mark.parametrize("name", ["llama-biases", "qwen3", "mixtral"])
def test_bfloat16_is_as_near_as_it_can_be(tmp_path: Path, name: str) -> None:
    model = make_checkpoint(tmp_path, name)
    pipeline = make_pipeline(tmp_path, boundaries=(2,), dtype=torch.bfloat16)
    tokens = [5, 17, 99, 42, 7, 63, 12, 80]
    (prefill,) = pipeline.step([(0, tokens[:5])])
    decodes = [pipeline.step([(0, [token])])[0] for token in tokens[5:]]
    ours = torch.cat([prefill, *decodes])
    expected = reference_logits(model, tokens)
    theirs = reference_logits(model.bfloat16(), tokens)
    assert ours.dtype == torch.float32
    assert (ours - expected).abs().mean() < 1.5 * (theirs - expected).abs().mean()
