"""The pieces joined are the whole text, and no piece ends where it must not."""

import itertools
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from flexpipe_serve.engine.detokenizer import IncrementalDetokenizer
from flexpipe_serve.engine.stop_strings import StopStringMatcher

CORPUS = [
    "The capital of France is Paris. the THE then than that this these those",
    "naïve café – “quoted” …  spaces   and\ttabs\n\nnewlines",
    "日本語のテキスト 한국어 텍스트 русский текст עברית العربية",
    "emoji 😀😃👩‍👩‍👧‍👦 🇫🇷 👍🏽 end",
    "def f(x):\n    return x ** 2  # code",
]


@pytest.fixture(scope="module")
def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    tokenizer.add_special_tokens([AddedToken("<|begin|>", special=True), AddedToken("<|end|>", special=True)])
    tokenizer.add_tokens([AddedToken("<tool call>", special=False)])
    return tokenizer


@pytest.fixture(scope="module")
def sentencepiece_like() -> Tokenizer:
    """Leading spaces as in Llama 2: stripped at the beginning of a text, bytes as ``<0xE2>``."""
    words = ["▁the", "▁cat", "▁is", "at", "s", "▁", "你", "<unk>"]
    vocab = {f"<0x{b:02X}>": b for b in range(256)} | {w: 256 + i for i, w in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def pieces_of(detokenizer: IncrementalDetokenizer, token_ids: list[int]) -> list[str]:
    pieces = []
    for token_id in token_ids:
        piece, stop = detokenizer.push(token_id)
        pieces.append(piece)
        if stop is not None:
            return pieces
    return [*pieces, detokenizer.flush()]


# Vocabulary of the byte-level tokenizer and some ids that it does not have.
any_ids = st.lists(st.integers(0, 430), max_size=60)
# Single bytes: mostly invalid UTF-8 (ids 0-255 are the byte alphabet).
byte_ids = st.lists(st.integers(0, 255), max_size=60)


@given(prompt=any_ids, output=any_ids | byte_ids, skip=st.booleans())
def test_pieces_join_to_the_whole_text(byte_level, prompt, output, skip):
    detokenizer = IncrementalDetokenizer(byte_level, prompt_token_ids=prompt, skip_special_tokens=skip)
    assert "".join(pieces_of(detokenizer, output)) == byte_level.decode(output, skip_special_tokens=skip)


@given(data=st.data())
def test_pieces_join_to_the_whole_text_among_broken_bytes(byte_level, data):
    broken = [i for i in range(256) if byte_level.decode([i]) == "\ufffd"]
    assert len(broken) == 128
    output = data.draw(st.lists(st.sampled_from(broken), max_size=60))
    detokenizer = IncrementalDetokenizer(byte_level, prompt_token_ids=[70])
    assert "".join(pieces_of(detokenizer, output)) == byte_level.decode(output)


@given(text=st.text(max_size=60))
def test_no_piece_ends_inside_a_character(byte_level, text):
    output = byte_level.encode(text).ids
    pieces = pieces_of(IncrementalDetokenizer(byte_level, prompt_token_ids=[70, 71]), output)
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)
        # And nothing is held longer than the last character needs.
        shown = 0
        for num_tokens, piece in enumerate(pieces, start=1):
            shown += len(piece)
            known = byte_level.decode(output[:num_tokens])
            if text.startswith(known):
                assert shown == len(known)


def test_bytes_that_never_become_a_character_are_shown_and_cost_constant_time(byte_level):
    euro = byte_level.encode("€").ids
    assert len(euro) == 3
    detokenizer = IncrementalDetokenizer(byte_level, prompt_token_ids=[])
    shown = 0
    for _ in range(200):
        shown += len(detokenizer.push(euro[1])[0])
    assert shown >= 190

    def seconds(num_tokens: int) -> float:
        fresh = IncrementalDetokenizer(byte_level, prompt_token_ids=[])
        start = time.process_time()
        pieces_of(fresh, [euro[1]] * num_tokens)
        return time.process_time() - start

    seconds(1000)
    # Quadratic cost would be 100 times as much; linear is 10 times.
    assert min(seconds(10_000) for _ in range(3)) < 40 * min(seconds(1_000) for _ in range(3))


def test_half_a_character_at_the_end_is_flushed(byte_level):
    ids = byte_level.encode("a€").ids
    assert len(ids) == 4
    detokenizer = IncrementalDetokenizer(byte_level, prompt_token_ids=[70])
    assert [detokenizer.push(i)[0] for i in ids[:-1]] == ["a", "", ""]
    assert detokenizer.flush() == "\ufffd"
    assert detokenizer.flush() == ""


def test_prompt_that_ends_inside_a_character_leaves_the_output_alone(byte_level):
    euro = byte_level.encode("€").ids
    detokenizer = IncrementalDetokenizer(byte_level, prompt_token_ids=euro[:2])
    output = byte_level.encode("hello").ids
    assert "".join(pieces_of(detokenizer, output)) == "hello"


def test_leading_space_depends_on_the_prompt(sentencepiece_like):
    the, cat = (sentencepiece_like.token_to_id(t) for t in ("▁the", "▁cat"))
    after_text = IncrementalDetokenizer(sentencepiece_like, prompt_token_ids=[the])
    assert after_text.push(cat) == (" cat", None)
    at_the_beginning = IncrementalDetokenizer(sentencepiece_like, prompt_token_ids=[])
    assert at_the_beginning.push(cat) == ("cat", None)
    assert at_the_beginning.push(cat) == (" cat", None)


@given(words=st.lists(st.sampled_from(["▁the", "▁cat", "▁is", "at", "s", "你", "▁", "🙂", "é", "日"]), max_size=40))
def test_byte_fallback(sentencepiece_like, words):
    def ids(word: str) -> list[int]:
        known = sentencepiece_like.token_to_id(word)
        return [known] if known is not None else list(word.encode())

    prompt = ids("▁the") + ids("日") + ids("🙂") + ids("日")
    output = list(itertools.chain.from_iterable(ids(w) for w in words))
    pieces = pieces_of(IncrementalDetokenizer(sentencepiece_like, prompt_token_ids=prompt), output)
    assert "".join(pieces) == "".join(words).replace("▁", " ")
    assert not any("\ufffd" in piece for piece in pieces)


stops = st.lists(st.text(alphabet="ab€ ", min_size=1, max_size=5), max_size=4)


@given(text=st.text(alphabet="ab€ ", max_size=40), stop=stops, include=st.booleans(), cuts=st.lists(st.integers(0, 40)))
def test_stop_strings_do_not_depend_on_the_cuts(text, stop, include, cuts):
    matcher = StopStringMatcher(stop, include=include)
    bounds = sorted({0, len(text), *(c for c in cuts if c < len(text))})
    shown, found, fed = "", None, 0
    for low, high in itertools.pairwise(bounds):
        piece, found = matcher.feed(text[low:high])
        shown, fed = shown + piece, high
        if found is not None:
            break
        # All that cannot be the beginning of a stop string is shown at once, and nothing else.
        held = text[len(shown) : high]
        assert text[:high] == shown + held
        longest = max((k for s in stop for k in range(len(s)) if text[:high].endswith(s[:k])), default=0)
        assert len(held) == longest
    # The reference: the first position where any stop string ends, the longest one there.
    ends = [(end, -len(s), s) for end in range(1, len(text) + 1) for s in stop if text[:end].endswith(s)]
    if ends:
        end, _, expected = min(ends)
        assert found == expected
        assert shown == text[: end if include else end - len(expected)]
        assert fed >= end
    else:
        assert found is None
        assert shown + matcher.flush() == text


@given(text=st.text(alphabet="ab€😀 ", max_size=30), stop=stops)
def test_stop_strings_across_tokens(byte_level, text, stop):
    detokenizer = IncrementalDetokenizer(byte_level, prompt_token_ids=[70], stop=stop)
    pieces = pieces_of(detokenizer, byte_level.encode(text).ids)
    matcher = StopStringMatcher(stop, include=False)
    expected, found = matcher.feed(text)
    assert "".join(pieces) == (expected if found is not None else text)
    if found is not None:
        assert detokenizer.flush() == ""


def test_stop_string_found_only_at_the_end(byte_level):
    """The last token holds the stop string's end and half a character: it is decided at the flush."""
    ids = [*byte_level.encode("xab").ids, byte_level.encode("€").ids[0]]
    detokenizer = IncrementalDetokenizer(byte_level, prompt_token_ids=[], stop=["ab\ufffd"])
    assert "".join(pieces_of(detokenizer, ids)) == "x"


def test_special_tokens_have_no_text_unless_asked_for(byte_level):
    end = byte_level.token_to_id("<|end|>")
    h, i = byte_level.encode("h").ids[0], byte_level.encode("i").ids[0]
    assert pieces_of(IncrementalDetokenizer(byte_level, prompt_token_ids=[]), [h, end, i]) == ["h", "", "i", ""]
    shown = IncrementalDetokenizer(byte_level, prompt_token_ids=[], skip_special_tokens=False)
    assert "".join(pieces_of(shown, [h, end, i])) == "h<|end|>i"
