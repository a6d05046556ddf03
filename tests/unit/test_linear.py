from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexpipe_serve.errors import ConfigError
from flexpipe_serve.kernels import linear_choice
from flexpipe_serve.kernels.linear import available_kinds, pack_linear
from flexpipe_serve.kernels.linear_choice import choose_linear, measure

CPU = torch.device("cpu")
KINDS = available_kinds(CPU, torch.float32)
SHAPES = [(64, 48), (48, 64)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("num_rows", [1, 2, 7])
@pytest.mark.parametrize(("out_features", "in_features"), [(40, 24), (33, 1500)])
def test_kinds_agree(kind: str, with_bias: bool, num_rows: int, out_features: int, in_features: int) -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(out_features, in_features), torch.randn(out_features) if with_bias else None
    x, residual = torch.randn(num_rows, in_features), torch.randn(num_rows, out_features)
    expected = x.double() @ weight.double().t() + (0 if bias is None else bias.double())
    kept = residual.clone()
    packed = pack_linear(weight.clone(), bias, kind=kind)
    torch.testing.assert_close(packed(x).double(), expected, atol=1e-3, rtol=1e-5)
    torch.testing.assert_close(packed.add_to(residual, x).double(), expected + residual, atol=1e-3, rtol=1e-5)
    assert torch.equal(residual, kept)


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("onednn", marks=pytest.mark.skipif("onednn" not in KINDS, reason="this torch has no oneDNN")),
        pytest.param("native", marks=pytest.mark.skipif("native" not in KINDS, reason="the kernels do not compile")),
    ],
)
@pytest.mark.parametrize("in_features", [576, 1024, 1536, 3000])
def test_bits_depend_neither_on_threads_nor_on_other_rows(kind: str, in_features: int) -> None:
    """What makes a request's tokens independent of what it is batched with, as far as linear maps go."""
    torch.manual_seed(0)
    packed = pack_linear(torch.randn(320, in_features), kind=kind)
    x = torch.randn(70, in_features)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = packed(x)
        torch.set_num_threads(2)
        assert torch.equal(packed(x), expected)
    finally:
        torch.set_num_threads(threads)
    for num_rows in (1, 2, 3, 8, 17, 64):
        assert torch.equal(packed(x[:num_rows]), expected[:num_rows]), num_rows


@pytest.mark.skipif("native" not in KINDS, reason="the kernels do not compile")
@given(
    num_rows=st.integers(1, 230),
    out_features=st.integers(1, 150),
    in_features=st.integers(1, 200),
    with_bias=st.booleans(),
    num_threads=st.integers(1, 4),
)
@settings(max_examples=150, deadline=None)
def test_native_of_any_shape(
    num_rows: int, out_features: int, in_features: int, with_bias: bool, num_threads: int
) -> None:
    generator = torch.Generator().manual_seed(num_rows)
    weight = torch.randn(out_features, in_features, generator=generator)
    bias = torch.randn(out_features, generator=generator) if with_bias else None
    x = torch.randn(num_rows, in_features, generator=generator)
    residual = torch.randn(num_rows, out_features, generator=generator)
    packed = pack_linear(weight.clone(), bias, kind="native")
    expected = x.double() @ weight.double().t() + (0 if bias is None else bias.double())
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(num_threads)
        y, sums = packed(x), packed.add_to(residual, x)
    finally:
        torch.set_num_threads(threads)
    assert (y - expected).abs().max() < 1e-4
    assert (sums - (residual + expected)).abs().max() < 1e-4
    row = num_rows // 2
    assert torch.equal(packed(x[row : row + 1]), y[row : row + 1])


@pytest.mark.skipif("native" not in KINDS, reason="the kernels do not compile")
def test_native_from_several_threads_at_once() -> None:
    """Stages of one process compute at the same time; helpers serve one of them."""
    torch.manual_seed(0)
    packed = pack_linear(torch.randn(600, 300), kind="native")
    inputs = [torch.randn(9, 300) for _ in range(4)]
    expected = [packed(x) for x in inputs]

    def compute(index: int) -> bool:
        torch.set_num_threads(2)
        return all(torch.equal(packed(inputs[index]), expected[index]) for _ in range(300))

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(compute, range(4)))


def test_unknown_kind_lists_what_works() -> None:
    with pytest.raises(ConfigError, match=r"'fast' does not work on cpu.*plain"):
        pack_linear(torch.zeros(2, 2), kind="fast")


def test_accelerators_take_plain(tmp_path: Path) -> None:
    device = torch.device("cuda")
    choice = choose_linear(SHAPES, dtype=torch.bfloat16, device=device, num_threads=1, cache_folder=tmp_path)
    assert choice == "plain"
    assert not list(tmp_path.iterdir())


def choose(folder: Path, *, num_threads: int = 1) -> str:
    return choose_linear(SHAPES, dtype=torch.float32, device=CPU, num_threads=num_threads, cache_folder=folder)


def test_measures_once_and_remembers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def fake(kinds: tuple[str, ...], shapes: object, *, dtype: torch.dtype) -> dict[str, float]:
        calls.append(torch.get_num_threads())
        return {kind: 1.0 if kind == "plain" else 2.0 for kind in kinds}

    monkeypatch.setattr(linear_choice, "measure", fake)
    before = torch.get_num_threads()
    assert choose(tmp_path / "new") == "plain"
    assert choose(tmp_path / "new") == "plain"
    assert calls == [1]
    assert torch.get_num_threads() == before
    choose(tmp_path / "new", num_threads=2)
    assert calls == [1, 2], "another number of threads is another question"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"kind": "nonsense"}'])
def test_damaged_memory_is_measured_again(tmp_path: Path, content: str) -> None:
    choose(tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_text(content)
    assert choose(tmp_path) in KINDS
    assert json.loads(file.read_text())["kind"] in KINDS


def test_preferred_kind_stays_unless_clearly_beaten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preferred, other = KINDS[0], KINDS[1]

    def pretend(seconds: float) -> None:
        times = dict.fromkeys(KINDS, 9.0) | {preferred: 1.05, other: seconds}
        monkeypatch.setattr(linear_choice, "measure", lambda *_, **__: times)

    pretend(1.0)
    assert choose(tmp_path / "a") == preferred
    pretend(0.9)
    assert choose(tmp_path / "b") == other


def test_measure_times_every_kind() -> None:
    assert all(0 < seconds < 10 for seconds in measure(KINDS, SHAPES, dtype=torch.float32).values())
