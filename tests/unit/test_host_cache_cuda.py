"""The host cache and a CUDA device. Run by ``scripts/gpu_check``; skipped where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flexpipe_serve.placement.host_cache import HostCache

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


def test_weights_come_back_to_the_device_as_they_were(tmp_path: Path) -> None:
    device = torch.device("cuda")
    weights = {
        "map.weight": torch.randn(3000, 777, device=device).to(torch.bfloat16),
        "map.bias": torch.randn(3, device=device),
    }
    cache = HostCache(tmp_path, key="key")
    assert cache.write("layer-0", weights, between=lambda: None)
    found = cache.read("layer-0", device=device, between=lambda: None)
    assert found is not None
    assert all(found[name].device.type == "cuda" and torch.equal(found[name], weights[name]) for name in weights)
    on_host = cache.read("layer-0", device=torch.device("cpu"), between=lambda: None)
    assert on_host is not None
    assert all(torch.equal(on_host[name], weights[name].cpu()) for name in weights)
