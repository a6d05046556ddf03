from __future__ import annotations

import ctypes

import pytest
import torch

from flexpipe_serve.errors import ConfigError
from flexpipe_serve.kernels import registry
from flexpipe_serve.kernels.flash_attention import FlashAttention
from flexpipe_serve.kernels.registry import check_block_size, get_attention_backend

CPU = torch.device("cpu")


@pytest.fixture(params=[False, True], ids=["no compiler", "compiler"])
def native_builds(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(registry, "native_library", lambda: ctypes.CDLL(None) if request.param else None)
    return bool(request.param)


def test_cpu_gets_native_where_it_builds(native_builds: bool) -> None:
    expected = "native" if native_builds else "torch"
    assert get_attention_backend("auto", device=CPU, dtype=torch.float32).name == expected
    assert get_attention_backend("auto", device=CPU, dtype=torch.bfloat16).name == "torch"
    assert get_attention_backend("torch", device=CPU, dtype=torch.float32).name == "torch"


def test_native_by_name_is_refused_where_it_cannot_run(native_builds: bool) -> None:
    with pytest.raises(ConfigError, match=r"native cannot run on cpu in torch.bfloat16.*float32"):
        get_attention_backend("native", device=CPU, dtype=torch.bfloat16)
    if native_builds:
        assert get_attention_backend("native", device=CPU, dtype=torch.float32).name == "native"
    else:
        with pytest.raises(ConfigError, match=r"C\+\+ compiler.*use 'torch' or 'auto'"):
            get_attention_backend("native", device=CPU, dtype=torch.float32)


def test_flash_on_a_cpu_is_refused_with_what_it_needs() -> None:
    with pytest.raises(ConfigError, match=r"flash_attn cannot run on cpu.*CUDA.*use 'torch' or 'auto'"):
        get_attention_backend("flash_attn", device=CPU, dtype=torch.float32)


def test_unknown_name_lists_the_known() -> None:
    with pytest.raises(ConfigError, match="'flsh'; it must be one of auto, torch, native, flash_attn"):
        get_attention_backend("flsh", device=CPU, dtype=torch.float32)


def test_torch_takes_any_block_size() -> None:
    backend = get_attention_backend("torch", device=CPU, dtype=torch.float32)
    check_block_size(backend, 1)
    check_block_size(backend, 48)
    with pytest.raises(ConfigError, match="block_size is 0"):
        check_block_size(backend, 0)


def test_flash_block_size_names_permitted_values() -> None:
    backend = FlashAttention.__new__(FlashAttention)  # the package itself is not needed to know its rule
    check_block_size(backend, 512)
    with pytest.raises(ConfigError, match="block_size is 16; attention backend flash_attn permits 256, 512, 768"):
        check_block_size(backend, 16)
