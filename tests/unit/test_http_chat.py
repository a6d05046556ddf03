"""/v1/chat/completions: parameters in, OpenAI's shapes out."""

import pytest
from fake_engine import REPLY
from http_client import error_of, events_of, json_of

HELLO = [{"role": "user", "content": "hello"}]


async def chat(client, **body):
    return json_of(await client.post("/v1/chat/completions", json={"messages": HELLO, "temperature": 0, **body}))


async def refused(client, **body):
    return error_of(await client.post("/v1/chat/completions", json={"messages": HELLO, **body}), 400)


async def events(client, **body):
    body = {"messages": HELLO, "temperature": 0, "stream": True, **body}
    return events_of(await client.post("/v1/chat/completions", json=body))


async def test_shape(client, engine):
    answer = await chat(client, max_tokens=5)
    num_prompt = len(engine.tokenizer.apply_chat_template(HELLO, add_generation_prompt=True))
    assert answer.pop("id").startswith("chatcmpl-")
    assert answer == {
        "object": "chat.completion",
        "created": answer["created"],
        "model": "fake/model",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Paris", "refusal": None},
                "logprobs": None,
                "finish_reason": "length",
                "stop_reason": None,
            }
        ],
        "usage": {
            "prompt_tokens": num_prompt,
            "completion_tokens": 5,
            "total_tokens": num_prompt + 5,
            "prompt_tokens_details": {"cached_tokens": num_prompt // 16 * 16},
        },
    }


async def test_max_tokens_defaults_to_the_rest_of_the_context(client, engine):
    answer = await chat(client, ignore_eos=True)
    assert answer["usage"]["total_tokens"] == engine.model.max_model_len
    assert answer["choices"][0]["finish_reason"] == "length"


async def test_max_completion_tokens(client):
    assert (await chat(client, max_completion_tokens=3))["usage"]["completion_tokens"] == 3
    assert (await chat(client, max_completion_tokens=3, max_tokens=None))["usage"]["completion_tokens"] == 3
    error = await refused(client, max_completion_tokens=3, max_tokens=4)
    assert (error["param"], error["code"]) == ("max_tokens", "invalid_parameter_combination")


async def test_messages_reach_the_template(client, engine, monkeypatch):
    seen = []
    monkeypatch.setattr(
        engine.tokenizer, "apply_chat_template", lambda messages, **kwargs: seen.append((messages, kwargs)) or [1]
    )
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "Ann"},
        {"role": "assistant", "content": None, "refusal": None, "tool_calls": [], "audio": None},
        {"role": "user", "content": "c"},
    ]
    await chat(client, messages=messages, max_tokens=1)
    assert seen == [
        (
            [
                {"role": "system", "content": "be brief"},
                {"role": "user", "content": "a\nb", "name": "Ann"},
                {"role": "assistant", "content": ""},
                {"role": "user", "content": "c"},
            ],
            {"add_generation_prompt": True},
        )
    ]


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ({}, "messages"),
        ([1], "messages[0]"),
        ([{"content": "x"}], "messages[0].role"),
        ([{"role": "tool", "content": "x"}], "messages[0].role"),
        ([{"role": "user"}], "messages[0].content"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
            "messages[0].content[0].type",
        ),
        ([{"role": "user", "content": [{"type": "text", "text": 1}]}], "messages[0].content[0].text"),
        ([{"role": "user", "content": "x"}, {"role": "user", "content": "x", "colour": 1}], "messages[1].colour"),
        ([{"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}], "messages[0].tool_calls"),
        ([{"role": "user", "content": "x"}, {"role": "system", "content": "late"}], "messages"),
    ],
)
async def test_bad_messages_are_named(client, messages, param):
    assert (await refused(client, messages=messages))["param"] == param


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", [{"type": "function"}]),
        ("functions", [{"name": "f"}]),
        ("tool_choice", "required"),
        ("response_format", {"type": "json_object"}),
        ("modalities", ["text", "audio"]),
        ("reasoning_effort", "low"),
        ("chat_template", "{{ x }}"),
        ("min_tokens", 5),
    ],
)
async def test_unsupported_parameters_are_named(client, field, value):
    error = await refused(client, **{field: value})
    assert (error["param"], error["code"]) == (field, "unsupported_parameter")
    await chat(client, max_tokens=1, **{field: None})


async def test_neutral_values_pass(client):
    await chat(client, max_tokens=1, tools=[], tool_choice="none", functions=[], response_format={"type": "text"})
    await chat(client, max_tokens=1, stream=False, store=False, n=1, service_tier="auto", modalities=["text"])
    chunks = await events(client, max_tokens=1, stream_options={"include_obfuscation": False})
    assert len(chunks) == 2


async def test_logprobs(client):
    content = (await chat(client, max_tokens=9, logprobs=True, top_logprobs=2))["choices"][0]["logprobs"]["content"]
    assert content[0] == {
        "token": "P",
        "logprob": -1.0,
        "bytes": [80],
        "top_logprobs": [
            {"token": "Q", "logprob": -0.5, "bytes": [81]},
            {"token": "P", "logprob": -1.0, "bytes": [80]},
        ],
    }
    assert len(content) == 9
    without_top = (await chat(client, max_tokens=1, logprobs=True))["choices"][0]["logprobs"]["content"]
    assert without_top[0]["top_logprobs"] == []


async def test_logprob_bytes_join_to_the_text(client):
    choice = (await chat(client, max_tokens=24, logprobs=True))["choices"][0]
    data = bytes(b for token in choice["logprobs"]["content"] for b in token["bytes"])
    assert data.decode() == choice["message"]["content"] == REPLY[:19]
    assert choice["logprobs"]["content"][9]["token"] == "\\xc3"


async def test_top_logprobs_need_logprobs(client):
    assert (await refused(client, top_logprobs=3))["param"] == "top_logprobs"
    assert (await refused(client, logprobs=True, top_logprobs=21))["param"] == "logprobs"
    await chat(client, top_logprobs=0, max_tokens=1)


async def test_stream(client):
    chunks = await events(client, max_tokens=3, stream_options={"include_usage": True})
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert chunks[0]["choices"] == [
        {
            "index": 0,
            "delta": {"role": "assistant", "content": ""},
            "logprobs": None,
            "finish_reason": None,
            "stop_reason": None,
        }
    ]
    assert [chunk["choices"][0]["delta"] for chunk in chunks[1:-1]] == [{"content": c} for c in "Par"]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[1:-1]] == [None, None, "length"]
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 3
    assert chunks[0]["usage"] is None


async def test_stream_end_without_text(client):
    chunks = await events(client)
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == REPLY
    assert chunks[-1]["choices"][0] == {
        "index": 0,
        "delta": {},
        "logprobs": None,
        "finish_reason": "stop",
        "stop_reason": None,
    }


async def test_stream_of_several_with_logprobs(client):
    body = {"n": 3, "temperature": 1, "seed": 2, "max_tokens": 12, "logprobs": True, "top_logprobs": 1}
    whole = await chat(client, **body)
    chunks = await events(client, **body)
    for choice in whole["choices"]:
        pieces = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        assert [p["delta"].get("role") for p in pieces] == ["assistant"] + [None] * (len(pieces) - 1)
        assert "".join(p["delta"].get("content", "") for p in pieces) == choice["message"]["content"]
        logprobs = [x for p in pieces if p["logprobs"] for x in p["logprobs"]["content"]]
        assert logprobs == choice["logprobs"]["content"]
