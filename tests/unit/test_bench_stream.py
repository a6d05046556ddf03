"""Decoding of recorded HTTP answers, however the network cut them."""

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexpipe_serve.bench.stream import StreamError, read_completion

PIECES = ["Hel", "lo", " wörld", "", "\n\n", "data: x"]
USAGE = {"prompt_tokens": 5, "completion_tokens": 6}


def events(pieces: list[str], *, usage: dict | None = None, done: bool = True) -> list[bytes]:
    messages: list[dict] = [{"choices": [{"text": piece, "finish_reason": None}]} for piece in pieces]
    messages.append({"choices": [{"text": "", "finish_reason": "length"}]})
    if usage is not None:
        messages.append({"choices": [], "usage": usage})
    found = [b"data: " + json.dumps(message, ensure_ascii=False).encode() + b"\n\n" for message in messages]
    return [*found, b"data: [DONE]\n\n"] if done else found


def chunked(parts: list[bytes]) -> bytes:
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    return head + b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


def cut(data: bytes, places: list[int]) -> list[tuple[float, bytes]]:
    edges = [0, *sorted({place % (len(data) + 1) for place in places}), len(data)]
    return [(float(end), data[start:end]) for start, end in itertools.pairwise(edges)]


@given(st.lists(st.integers(0, 10_000), max_size=40), st.sampled_from(["chunked", "sized", "closed", "crlf"]))
def test_cuts_anywhere_change_nothing_but_the_times(places: list[int], framing: str) -> None:
    parts = events(PIECES, usage=USAGE)
    body = b"".join(parts)
    data = {
        "chunked": chunked(parts),
        "sized": b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body),
        "closed": b"HTTP/1.0 200 OK\r\n\r\n" + body,
        "crlf": b"HTTP/1.1 200 OK\r\n\r\n: a comment\r\n" + body.replace(b"\n\n", b"\r\n\r\n"),
    }[framing]
    arrivals = cut(data, places)
    completion = read_completion(arrivals)
    assert completion.text == "".join(PIECES)
    assert (completion.num_prompt_tokens, completion.num_output_tokens) == (5, 6)
    assert completion.finish_reason == "length"
    assert len(completion.token_times_s) == len([piece for piece in PIECES if piece])
    assert completion.token_times_s == sorted(completion.token_times_s)
    assert set(completion.token_times_s) <= {time_s for time_s, _ in arrivals}


def test_a_piece_has_the_time_of_the_bytes_that_complete_it() -> None:
    parts = events(["a", "b"], usage=None)
    first, second = chunked(parts[:1])[: -len(b"0\r\n\r\n")], chunked(parts)
    middle = len(first) - 10
    completion = read_completion(
        [(1.0, second[:middle]), (2.0, second[middle : len(first)]), (3.0, second[len(first) :])]
    )
    assert completion.token_times_s == [2.0, 3.0]


def test_without_usage_pieces_are_counted() -> None:
    assert read_completion([(0.0, chunked(events(["a", "b", "c"])))]).num_output_tokens == 3


def test_a_stream_without_done_is_complete_if_it_says_why_it_ended() -> None:
    assert read_completion([(0.0, chunked(events(["a"], done=False)))]).num_output_tokens == 1


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "closed without an answer"),
        (b"SSH-2.0-x\r\n\r\n", "not an HTTP answer"),
        (b"HTTP/1.1 503 Busy\r\nContent-Length: 5\r\n\r\nlater", "HTTP 503: later"),
        (b'HTTP/1.1 429 x\r\n\r\n{"error": {"message": "queue is full"}}', "HTTP 429: queue is full"),
        (b'HTTP/1.1 422 x\r\n\r\n{"detail": "no ignore_eos"}', "HTTP 422: no ignore_eos"),
        (chunked([b"data: {nonsense\n\n"]), "unreadable answer"),
        (chunked([b'data: {"error": {"message": "engine died"}}\n\n']), "error in the stream: engine died"),
        (chunked(events(["a", "b"]))[:-60], "broke off after 2"),
        (chunked(events(["a"])[:1]), "broke off after 1"),
        (chunked(events([])), "carried no text"),
    ],
)
def test_failures_have_a_reason(data: bytes, reason: str) -> None:
    with pytest.raises(StreamError, match=reason):
        read_completion([(0.0, data)])


@given(st.binary(max_size=300), st.booleans())
def test_garbage_is_a_stream_error_and_nothing_else(garbage: bytes, with_head: bool) -> None:
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" if with_head else b""
    with pytest.raises(StreamError):
        read_completion([(0.0, head + garbage)])
