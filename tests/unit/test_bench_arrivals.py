"""Arrival processes, trace reading and prompts of an exact length."""

import gzip
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from flexpipe_serve.bench.arrivals import Arrival, gamma_arrivals, read_trace
from flexpipe_serve.bench.prompts import PromptBuilder
from flexpipe_serve.errors import ConfigError


def gaps(arrivals: list[Arrival]) -> np.ndarray:
    return np.diff([0.0] + [arrival.at_s for arrival in arrivals])


def gamma(num_requests: int, **options: object) -> list[Arrival]:
    settings: dict = {"rate": 4.0, "cv": 1.0, "num_prompt_tokens": 7, "num_output_tokens": 9, "seed": (0,)}
    return gamma_arrivals(num_requests, **(settings | options))


@pytest.mark.parametrize("cv", [0.25, 1.0, 3.0])
@pytest.mark.parametrize("rate", [0.5, 40.0])
def test_gaps_have_the_rate_and_the_cv_asked_for(rate: float, cv: float) -> None:
    found = gaps(gamma(200_000, rate=rate, cv=cv))
    assert found.mean() == pytest.approx(1 / rate, rel=0.04)
    assert found.std() / found.mean() == pytest.approx(cv, rel=0.04)


def test_cv_zero_is_a_metronome() -> None:
    assert gaps(gamma(10, rate=5, cv=0)) == pytest.approx([0.2] * 10)


def test_infinite_rate_sends_all_at_once() -> None:
    assert [arrival.at_s for arrival in gamma(5, rate=float("inf"))] == [0.0] * 5


def test_seed_decides() -> None:
    assert gamma(20) == gamma(20)
    assert gamma(20) != gamma(20, seed=(1,))
    assert gamma(1)[0].num_prompt_tokens == 7
    assert gamma(1)[0].num_output_tokens == 9


@pytest.mark.parametrize(
    "options", [{"rate": 0}, {"rate": -1}, {"rate": float("nan")}, {"cv": -1}, {"cv": float("inf")}]
)
def test_impossible_processes_are_refused(options: dict) -> None:
    with pytest.raises(ConfigError):
        gamma(3, **options)


TRACE = "arrival_s,prompt_tokens,output_tokens,client_id\n0.5,100,10,a\n1.5,2000,1,b\n1.5,3,400,a\n"


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.csv.gz"
    path.write_bytes(gzip.compress(TRACE.encode()))
    return path


def test_trace_as_recorded(trace: Path, tmp_path: Path) -> None:
    expected = [Arrival(0.5, 100, 10), Arrival(1.5, 2000, 1), Arrival(1.5, 3, 400)]
    assert read_trace(trace) == expected
    plain = tmp_path / "plain.csv"
    plain.write_text(TRACE)
    assert read_trace(plain) == expected


def test_trace_scaled_and_limited(trace: Path) -> None:
    scaled = read_trace(
        trace, time_scale=2, length_scale=0.1, max_prompt_tokens=150, max_output_tokens=20, max_requests=2
    )
    assert scaled == [Arrival(1.0, 10, 1), Arrival(3.0, 150, 1)]


@given(st.lists(st.tuples(st.floats(0, 1e4), st.integers(0, 9999), st.integers(0, 9999)), min_size=1, max_size=20))
def test_any_ascending_trace_is_read_back(tmp_path_factory: pytest.TempPathFactory, rows: list) -> None:
    rows = sorted(rows)
    path = tmp_path_factory.mktemp("trace") / "t.csv"
    path.write_text("arrival_s,prompt_tokens,output_tokens\n" + "".join(f"{t!r},{p},{o}\n" for t, p, o in rows))
    # A request of no tokens cannot be sent, so lengths are at least one.
    assert read_trace(path) == [Arrival(t, max(p, 1), max(o, 1)) for t, p, o in rows]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("arrival_s,prompt_tokens\n0,1\n", "row 1"),
        ("arrival_s,prompt_tokens,output_tokens\n0,1,1\n1,x,1\n", "row 2"),
        ("arrival_s,prompt_tokens,output_tokens\n5,1,1\n4,1,1\n", "ascending"),
        ("arrival_s,prompt_tokens,output_tokens\n", "no request"),
    ],
)
def test_bad_traces_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_trace(path)


def test_a_missing_trace_and_bad_scales_are_refused(tmp_path: Path, trace: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_trace(tmp_path / "none.csv")
    with pytest.raises(ConfigError, match="time scale"):
        read_trace(trace, time_scale=0)
    with pytest.raises(ConfigError, match="length scale"):
        read_trace(trace, length_scale=float("inf"))


def write_tokenizer(folder: Path, *, num_special: int) -> None:
    """A word-level tokenizer of 300 words; ``num_special`` of <s> are put before every text."""
    words = ["Ġ" + "".join(chr(97 + (i // 26**k) % 26) for k in range(3)) for i in range(300)]
    vocabulary = {token: i for i, token in enumerate(["<s>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if num_special:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> " * num_special + "$A", special_tokens=[("<s>", 0)]
        )
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.mark.parametrize("num_special", [0, 1, 2])
def test_prompts_have_exactly_the_length_asked_for_and_differ(tmp_path: Path, num_special: int) -> None:
    write_tokenizer(tmp_path, num_special=num_special)
    builder, rng = PromptBuilder(tmp_path), np.random.default_rng(0)
    for num_tokens in (3, 4, 17, 128, 1999):
        texts = [builder.build(num_tokens, rng) for _ in range(5)]
        assert [len(builder.ids(text)) for text in texts] == [num_tokens] * 5
        assert num_tokens < 17 or len(set(texts)) == 5
    with pytest.raises(ConfigError, match="longer prompt"):
        builder.build(num_special, rng)


def test_a_folder_without_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer\.json does not exist"):
        PromptBuilder(tmp_path)
