"""The same stages on a CUDA device. Run by ``scripts/gpu_check``; skipped where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import Pipeline, make_checkpoint, make_pipeline, reference_logits

from flexpipe_serve.kernels import flash_attention
from flexpipe_serve.kernels.registry import get_attention_backend

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
TOKENS = [[5, 17, 99, 42, 7, 63, 12, 80], [9, 4, 77, 23, 5, 61]]


def run(pipeline: Pipeline) -> list[torch.Tensor]:
    """Logits of both sequences: prefills, a chunk on cached tokens, decodes, all mixed."""
    steps = [
        pipeline.step([(0, TOKENS[0][:5]), (1, TOKENS[1][:3])]),
        pipeline.step([(1, TOKENS[1][3:5]), (0, TOKENS[0][5:6])]),
        pipeline.step([(0, TOKENS[0][6:7]), (1, TOKENS[1][5:])]),
        pipeline.step([(0, TOKENS[0][7:])]),
    ]
    first = [steps[0][0], steps[1][1], steps[2][0], steps[3][0]]
    second = [steps[0][1], steps[1][0], steps[2][1]]
    return [torch.cat(first).cpu(), torch.cat(second).cpu()]


@pytest.mark.parametrize("name", ["llama-tied", "qwen2", "qwen3", "phi3", "mixtral", "qwen3_moe"])
def test_float32_agrees_with_the_cpu_reference(tmp_path: Path, name: str) -> None:
    model = make_checkpoint(tmp_path, name)
    for logits, tokens in zip(
        run(make_pipeline(tmp_path, boundaries=(1, 3), device=torch.device("cuda"))), TOKENS, strict=True
    ):
        torch.testing.assert_close(logits, reference_logits(model, tokens), atol=1e-3, rtol=0)


@pytest.mark.parametrize("attention", ["torch", "flash_attn"])
def test_bfloat16_attention_backends(tmp_path: Path, attention: str) -> None:
    device, dtype = torch.device("cuda"), torch.bfloat16
    if attention == "flash_attn" and not flash_attention.is_available(device):
        pytest.skip("flash-attn is not installed")
    model = make_checkpoint(tmp_path, "llama", hidden_size=256, head_dim=64)
    backend = get_attention_backend(attention, device=device, dtype=dtype)
    block_size = max(16, backend.block_size_multiple)
    pipeline = make_pipeline(
        tmp_path, boundaries=(2,), device=device, dtype=dtype, attention=backend, block_size=block_size
    )
    expected = [reference_logits(model, tokens) for tokens in TOKENS]
    theirs = [reference_logits(model.bfloat16(), tokens) for tokens in TOKENS]
    for logits, exact, rounded in zip(run(pipeline), expected, theirs, strict=True):
        assert (logits - exact).abs().mean() < 2 * (rounded - exact).abs().mean()
