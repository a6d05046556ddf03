"""Whatever is wrong, the answer has OpenAI's shape and names what to change."""

import gzip
import logging

import httpx
import pytest
from fake_engine import FakeEngine
from http_client import client_of, error_of, events_of

from flexpipe_serve.deployments.api import create_app
from flexpipe_serve.deployments.limits import HttpLimits
from flexpipe_serve.errors import EngineUnavailableError, InvalidRequestError, QueueFullError


async def refused(client, status=400, **body):
    return error_of(await client.post("/v1/completions", json={"prompt": "hi", **body}), status)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"seed": 2**63}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"n": 0}, "n"),
        ({"n": 257}, "n"),
        ({"n": 2, "best_of": 3}, "best_of"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"stop": ""}, "stop"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": "x" * 1025}, "stop"),
        ({"stop": [1]}, "stop[0]"),
        ({"stop_token_ids": [264]}, "stop_token_ids"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"stop_token_ids": [1] * 257}, "stop_token_ids"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"logit_bias": {"264": 1}}, "logit_bias"),
        ({"logit_bias": {"one": 1}}, "logit_bias"),
        ({"priority": 2**31}, "priority"),
        ({"suffix": "x"}, "suffix"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"max_completion_tokens": 3}, "max_completion_tokens"),
        ({"temprature": 1}, "temprature"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"colour": 1}}, "stream_options.colour"),
        ({"stream": "yes"}, "stream"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [1, [2]]}, "prompt"),
        ({"prompt": [264]}, "prompt"),
        ({"prompt": [[1], [-1]]}, "prompt[1]"),
        ({"prompt": [2**64]}, "prompt[0]"),
        ({"prompt": ["x"] * 257}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": {"text": "x"}}, "prompt"),
    ],
)
async def test_a_bad_parameter_is_named(client, engine, body, param):
    error = await refused(client, **body)
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert engine.started == []


async def test_an_unknown_parameter_gets_a_hint(client):
    error = await refused(client, max_token=3)
    assert error["code"] == "unknown_parameter"
    assert "'max_tokens'" in error["message"]


async def test_missing_prompt(client):
    error = error_of(await client.post("/v1/completions", json={}), 400)
    assert error["param"] == "prompt"
    assert "required" in error["message"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"prompt"',
        b'{"prompt": "hi"} x',
        b'{"prompt": "\xff\xfe"}',
        b'\xef\xbb\xbf{"prompt": "hi"}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "a\x01b"}',
        b'{"prompt": "hi", "temperature": NaN}',
        b'{"prompt": "hi", "temperature": Infinity}',
        b'{"prompt": "hi", "temperature": 1e999}',
        b'{"prompt": "hi", "max_tokens": ' + b"9" * 4299 + b"}",
        b'{"prompt": "hi", "max_tokens": ' + b"9" * 100_000 + b"}",
        b'{"prompt": "hi", "logit_bias": {"' + b"9" * 50_000 + b'": 1}}',
        b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"prompt": "hi", "tools": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"}",
        b"[" * 100_000,
        gzip.compress(b'{"prompt": "hi"}', mtime=0),
        b'{"prompt": "hi", "' + b"x" * 100_000 + b'": 1}',
    ],
    ids=lambda body: repr(body[:40]),
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"])
async def test_a_bad_body_is_a_400(client, path, body):
    error = error_of(await client.post(path, content=body), 400)
    assert len(error["message"]) < 1000


async def test_the_content_type_does_not_matter(client):
    headers = {"content-type": "text/plain"}
    response = await client.post("/v1/completions", content=b'{"prompt": "hi"}', headers=headers)
    assert response.status_code == 200


async def test_context_length(client):
    error = await refused(client, prompt="x" * 100, max_tokens=413)
    assert (error["code"], error["param"]) == ("context_length_exceeded", "max_tokens")
    for number in ("512", "513", "100", "413", "412"):
        assert number in error["message"]
    assert (await client.post("/v1/completions", json={"prompt": "x" * 100, "max_tokens": 412})).status_code == 200
    for num_chars in (512, 600):
        error = await refused(client, prompt="x" * num_chars)
        assert (error["code"], error["param"]) == ("context_length_exceeded", "prompt")
    messages = [{"role": "user", "content": "x" * 600}]
    error = error_of(await client.post("/v1/chat/completions", json={"messages": messages}), 400)
    assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")


async def test_the_default_of_max_tokens_adapts(client):
    answer = (await client.post("/v1/completions", json={"prompt": "x" * 510})).json()
    assert answer["usage"]["completion_tokens"] == 2


async def test_limits_are_read_for_every_request(engine):
    limits = HttpLimits(max_prompt_tokens=5, max_body_bytes=100)
    async with client_of(engine, get_limits=lambda: limits) as client:
        error = await refused(client, prompt="123456")
        assert (error["code"], error["param"]) == ("context_length_exceeded", "prompt")
        assert (await refused(client, 413, prompt="x" * 100))["code"] == "request_too_large"
        limits = HttpLimits(max_prompt_tokens=6, max_body_bytes=200)
        assert (await client.post("/v1/completions", json={"prompt": "123456"})).status_code == 200
        assert (await refused(client, 400, prompt="x" * 100))["code"] == "context_length_exceeded"


async def test_body_limit_without_content_length(engine):
    num_read = 0

    async def chunks():
        nonlocal num_read
        for _ in range(1000):
            num_read += 1
            yield b" " * 100

    async with client_of(engine, get_limits=lambda: HttpLimits(max_body_bytes=1000)) as client:
        error_of(await client.post("/v1/completions", content=chunks()), 413)
    # Of a body without end only so much is read.
    assert num_read <= 12


async def test_model_not_found(client):
    error = await refused(client, 404, model="gpt-4")
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert "fake/model" in error["message"]
    error_of(await client.get("/v1/models/gpt-4"), 404)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/nothing", 404),
        ("POST", "/v1/completions/", 404),
        ("GET", "/v1/completions", 405),
        ("DELETE", "/v1/models", 405),
        ("GET", "/%00%ff", 404),
    ],
)
async def test_unknown_urls(client, method, path, status):
    response = await client.request(method, path)
    error = error_of(response, status)
    assert error["type"] == "invalid_request_error"
    assert method in error["message"]
    assert ("allow" in response.headers) == (status == 405)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("raised", "status", "code", "retry_after"),
    [
        (QueueFullError("The queue is full.", retry_after_s=7), 429, "rate_limit_exceeded", "7"),
        (EngineUnavailableError("Starting."), 503, "engine_unavailable", "5"),
        (
            InvalidRequestError("Too long.", param="prompt", code="context_length_exceeded"),
            400,
            "context_length_exceeded",
            None,
        ),
    ],
)
async def test_what_the_engine_refuses(stream, raised, status, code, retry_after):
    async with client_of(FakeEngine(refuse_with=raised)) as client:
        response = await client.post("/v1/completions", json={"prompt": "hi", "stream": stream})
    error = error_of(response, status)
    assert (error["message"], error["code"]) == (str(raised), code)
    assert response.headers.get("retry-after") == retry_after


async def test_one_refused_prompt_ends_the_others():
    engine = FakeEngine(max_running=3)
    async with client_of(engine) as client:
        await refused(client, 429, prompt=["a", "b", "c", "d"])
    assert len(engine.aborted) == 3
    assert engine.finished == []


@pytest.mark.parametrize("stream", [False, True])
async def test_a_crash_before_the_first_output_is_a_500_and_logged(stream, caplog):
    async with client_of(FakeEngine(crash_after=0)) as client:
        response = await client.post(
            "/v1/completions", json={"prompt": "hi", "stream": stream}, headers={"X-Request-Id": "abc"}
        )
    error = error_of(response, 500)
    assert error["type"] == "server_error"
    assert "crashed" not in error["message"]
    assert "abc" in error["message"]
    records = [r for r in caplog.records if r.levelno == logging.ERROR]
    assert len(records) == 1
    assert "abc" in records[0].getMessage()
    assert "the fake engine crashed" in str(records[0].exc_info[1])


@pytest.mark.parametrize("prompt", ["hi", ["hi", "ho"]])
@pytest.mark.parametrize(("failure", "message"), [("error_after", "A stage was lost."), ("crash_after", "Internal")])
async def test_a_failure_in_mid_stream_is_an_event(failure, message, prompt):
    engine = FakeEngine(**{failure: 3})
    async with client_of(engine) as client:
        response = await client.post("/v1/completions", json={"prompt": prompt, "stream": True, "temperature": 0})
    *chunks, failed = events_of(response)
    error = failed["error"]
    assert error["type"] == "server_error"
    assert error["message"].startswith(message)
    pieces = [chunk["choices"][0] for chunk in chunks]
    assert "".join(p["text"] for p in pieces if p["index"] == 0) == "Par"
    assert engine.finished == []
    assert len(engine.aborted) == len(engine.started)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_a_failure_without_a_stream(path):
    async with client_of(FakeEngine(error_after=3)) as client:
        response = await client.post(
            path, json={"prompt": "hi"} if "chat" not in path else {"messages": [{"role": "user", "content": "x"}]}
        )
    error = error_of(response, 500)
    assert (error["message"], error["code"]) == ("A stage was lost.", "generation_failed")


async def test_a_crash_outside_generation_is_a_500(engine, caplog, monkeypatch):
    monkeypatch.setattr(engine, "status", lambda: 1 / 0)
    async with client_of(engine) as client:
        error = error_of(await client.get("/flexpipe/status"), 500)
    assert "division" not in error["message"]
    assert "ZeroDivisionError" in caplog.text


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (
            {"role": "tool", "content": "x"},
            "messages[0].role: invalid enum value 'tool'; it is one of 'assistant', 'developer', 'system', 'user'.",
        ),
        (
            {"role": "user", "content": [{"type": "image_url"}]},
            "messages[0].content[0].type: invalid value 'image_url'; it is one of 'text'.",
        ),
        ({"role": 3, "content": "x"}, "messages[0].role: expected 'str', got 'int'."),
    ],
)
async def test_a_value_out_of_a_few_is_answered_with_those(client, message, expected):
    error = error_of(await client.post("/v1/chat/completions", json={"messages": [message]}), 400)
    assert error["message"] == expected


async def test_no_engine_yet():
    def no_engine():
        raise EngineUnavailableError("The stages are starting.")

    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(create_app(no_engine)), base_url="http://test"
    ) as client:
        for path in ("/health", "/v1/models", "/flexpipe/status", "/flexpipe/refactor", "/flexpipe/refactor/r-1"):
            response = await client.get(path)
            assert error_of(response, 503)["message"] == "The stages are starting."
            assert response.headers["retry-after"]
        assert (await client.get("/docs")).status_code == 200
