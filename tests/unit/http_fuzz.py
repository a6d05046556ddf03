"""Bad input over HTTP: never a 5xx, and never harm to a neighbour. For any server that speaks the API.

``fuzz(base_url)`` sends what hypothesis invents, one request at a time, while another thread streams a
well-behaved request over and over and compares each answer with the first.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import threading
import urllib.parse
from collections.abc import Iterator, Mapping
from typing import Any

import httpx
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

BAD_INTS = [-(2**70), -(2**63), -1, 0, 2**31, 2**53, 2**63, 2**64, 10**30, 10**4000]
"""None of them is a large number of tokens that a real model would really generate."""

texts = st.one_of(
    st.text(max_size=20),
    st.text(st.characters(), max_size=8),
    st.sampled_from(
        ["", "\x00", "\ud800", "\udfff\ud800", "\ufeff", "😀", "<|im_end|>", "a" * 5000, "{{ 1/0 }}", "\u202e"]
    ),
)
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from(BAD_INTS),
    st.integers(1, 4),
    st.floats(),
    texts,
)
junk = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3), max_leaves=6
)

good_texts = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20)
token_ids = st.lists(st.integers(0, 255), min_size=1, max_size=6)

COMMON = {
    "model": st.none(),
    "temperature": st.floats(0, 2),
    "top_p": st.floats(0.01, 1),
    "top_k": st.integers(-1, 1000),
    "min_p": st.floats(0, 1),
    "seed": st.integers(-(2**63), 2**63 - 1),
    "n": st.integers(1, 3),
    "max_tokens": st.integers(0, 4),
    "stop": good_texts | st.lists(good_texts, max_size=3),
    "stop_token_ids": token_ids,
    "presence_penalty": st.floats(-2, 2),
    "frequency_penalty": st.floats(-2, 2),
    "repetition_penalty": st.floats(0.01, 10),
    "logit_bias": st.dictionaries(st.integers(0, 255).map(str), st.floats(-100, 100), max_size=3),
    "ignore_eos": st.booleans(),
    "include_stop_str_in_output": st.booleans(),
    "stream": st.booleans(),
    "stream_options": st.fixed_dictionaries({"include_usage": st.booleans()}),
    "priority": st.integers(-10, 10),
    "user": good_texts,
    "tools": st.just([]),
    "suffix": st.just(""),
}
COMPLETION = {
    **COMMON,
    "prompt": good_texts
    | st.lists(good_texts, min_size=1, max_size=3)
    | token_ids
    | st.lists(token_ids, min_size=1, max_size=3),
    "logprobs": st.integers(0, 20),
    "echo": st.booleans(),
    "best_of": st.integers(1, 3),
}
messages = st.lists(
    st.fixed_dictionaries(
        {
            "role": st.sampled_from(["user", "assistant"]),
            "content": good_texts | st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": good_texts})),
        },
        optional={"name": good_texts, "tool_calls": st.just([])},
    ),
    min_size=1,
    max_size=3,
)
CHAT = {**COMMON, "messages": messages, "logprobs": st.booleans(), "top_logprobs": st.integers(0, 20)}
TOKENIZE = {"prompt": good_texts, "messages": messages, "add_special_tokens": st.booleans()}
DETOKENIZE = {"tokens": token_ids}


@dataclasses.dataclass
class FuzzRequest:
    """What to send, and whether to leave before the answer is complete."""

    method: str
    path: str
    content: bytes
    leave: bool = False


@dataclasses.dataclass
class FuzzReport:
    """What came back."""

    statuses: collections.Counter[int] = dataclasses.field(default_factory=collections.Counter)
    num_neighbours: int = 0


def _bodies(fields: Mapping[str, st.SearchStrategy[Any]], required: tuple[str, ...]) -> st.SearchStrategy[Any]:
    """Mostly valid bodies, some with junk in a field, some with a field that does not exist."""
    valid = st.fixed_dictionaries(
        {name: fields[name] for name in required},
        optional={name: field for name, field in fields.items() if name not in required},
    )
    spoiled = st.dictionaries(st.sampled_from(sorted(fields)) | texts, junk, max_size=2)
    return st.builds(lambda good, bad: {**good, **bad}, valid, st.just({}) | st.just({}) | spoiled).map(_bound)


def _bound(body: dict[str, Any]) -> dict[str, Any]:
    # A chat without a limit goes on to the end of the context: minutes on a real model.
    if "messages" in body and body.get("max_tokens") is None:
        body["max_tokens"] = 3
    return body


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


def _break(content: bytes, position: int, junk_bytes: bytes) -> bytes:
    position %= len(content) + 1
    return content[:position] + junk_bytes + content[position + 1 :]


_GENERATION_BODIES = {
    "/v1/completions": _bodies(COMPLETION, ("prompt",)),
    "/v1/chat/completions": _bodies(CHAT, ("messages",)),
}
_BODIES = {
    **_GENERATION_BODIES,
    "/tokenize": _bodies(TOKENIZE, ()),
    "/detokenize": _bodies(DETOKENIZE, ()),
}


@st.composite
def requests(draw: st.DrawFn) -> FuzzRequest:
    """One request."""
    kind = draw(st.sampled_from(["generate", "generate", "generate", "any", "broken", "bytes", "url"]))
    path = draw(st.sampled_from(sorted(_GENERATION_BODIES if kind == "generate" else _BODIES)))
    if kind == "url":
        segments = draw(st.lists(st.binary(min_size=1, max_size=6), max_size=3))
        path = "/" + "/".join(urllib.parse.quote(segment, safe="") for segment in segments)
        method = draw(st.sampled_from(["GET", "HEAD", "OPTIONS", "POST", "PUT", "DELETE", "PATCH", "TRACE"]))
        return FuzzRequest(method, path, b"")
    if kind == "bytes":
        return FuzzRequest("POST", path, draw(st.binary(max_size=40)))
    body = draw(junk) if kind == "any" else draw(_BODIES[path])
    content = _json(_bound(body) if isinstance(body, dict) else body)
    if kind == "broken":
        content = _break(content, draw(st.integers(0, 2**16)), draw(st.binary(max_size=3)))
    return FuzzRequest("POST", path, content, leave=kind == "generate" and draw(st.booleans()))


def send(client: httpx.Client, request: FuzzRequest) -> int:
    """Send one request and check its answer, as far as it is read. Returns the status."""
    with client.stream(request.method, request.path, content=request.content) as response:
        assert response.status_code < 500, (request, response.read())
        assert "x-request-id" in response.headers
        if request.leave and response.status_code == 200:
            next(response.iter_raw(), None)
            return response.status_code
        text = response.read().decode()
    if response.status_code >= 400 and request.method != "HEAD":
        error = json.loads(text)["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["message"]
    elif response.headers.get("content-type", "").startswith("text/event-stream"):
        blocks = text.split("\n\n")
        assert blocks[-2:] == ["data: [DONE]", ""]
        assert all("error" not in json.loads(block.removeprefix("data: ")) for block in blocks[:-2])
    return response.status_code


def fuzz(base_url: str, *, max_examples: int, headers: Mapping[str, str] | None = None) -> FuzzReport:
    """Raises AssertionError where a request gets a 5xx or a malformed answer, or a neighbour's answer is not whole."""
    report = FuzzReport()
    with (
        httpx.Client(base_url=base_url, headers=headers, timeout=120) as client,
        _neighbour(base_url, headers, report),
    ):

        @settings(
            max_examples=max_examples,
            deadline=None,
            database=None,
            # A failure names its request; to shrink it would take a real server minutes.
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(requests())
        def one(request: FuzzRequest) -> None:
            report.statuses[send(client, request)] += 1

        one()
    return report


@contextlib.contextmanager
def _neighbour(base_url: str, headers: Mapping[str, str] | None, report: FuzzReport) -> Iterator[None]:
    stop = threading.Event()
    answers: list[str] = []
    problems: list[BaseException] = []

    def run() -> None:
        body = {
            "prompt": "The capital of France is",
            "max_tokens": 24,
            "temperature": 0,
            "stream": True,
            "priority": -1,
        }
        try:
            with httpx.Client(base_url=base_url, headers=headers, timeout=120) as client:
                while not (stop.is_set() and answers):
                    answers.append(_stream_text(client, body))
        except Exception as problem:
            problems.append(problem)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(120)
    assert not thread.is_alive()
    assert not problems, problems
    assert set(answers) == {answers[0]}, "the neighbour's answers differ"
    assert answers[0]
    report.num_neighbours = len(answers)


def _stream_text(client: httpx.Client, body: dict[str, Any]) -> str:
    response = client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    blocks = response.text.split("\n\n")
    assert blocks[-2:] == ["data: [DONE]", ""]
    choices = [json.loads(block.removeprefix("data: "))["choices"][0] for block in blocks[:-2]]
    assert choices[-1]["finish_reason"] in ("stop", "length")
    return "".join(choice["text"] for choice in choices)
