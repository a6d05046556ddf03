"""Bytes of tokens, joined, are the text."""

from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from flexpipe_serve.engine.token_bytes import token_bytes

BYTE_LEVEL = Tokenizer(
    models.BPE(vocab={c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[])
)
BYTE_LEVEL.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
BYTE_LEVEL.decoder = decoders.ByteLevel()
BYTE_LEVEL.add_special_tokens([AddedToken("<|end of text|>", special=True)])


@given(text=st.text(max_size=40))
def test_byte_level(text):
    assert b"".join(token_bytes(BYTE_LEVEL, i) for i in BYTE_LEVEL.encode(text).ids) == text.encode()


@given(token_id=st.integers(0, 257))
def test_bytes_decode_to_what_the_tokenizer_says(token_id):
    assert token_bytes(BYTE_LEVEL, token_id).decode(errors="replace") == BYTE_LEVEL.decode(
        [token_id], skip_special_tokens=False
    )


def test_sentencepiece_like():
    vocab = {"<unk>": 0, "▁the": 1, "<0xE2>": 2, "é": 3}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    assert [token_bytes(tokenizer, i) for i in range(5)] == [b"<unk>", b" the", b"\xe2", "é".encode(), b""]
