"""The official client, unmodified, against the application on a socket."""

from __future__ import annotations

import sys
from pathlib import Path

import openai
import pytest

sys.path.append(str(Path(__file__).parents[1] / "unit"))  # the fake engine lives there

from fake_engine import REPLY, FakeEngine
from http_server import serve

from flexpipe_serve.deployments.api import create_app
from flexpipe_serve.deployments.limits import HttpLimits
from flexpipe_serve.errors import EngineUnavailableError, QueueFullError

MODEL = "fake/model"
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def base_url():
    with serve(create_app(FakeEngine, api_keys=("key",))) as url:
        yield f"{url}/v1"


@pytest.fixture
def client(base_url):
    with openai.OpenAI(base_url=base_url, api_key="key", max_retries=0) as client:
        yield client


@pytest.fixture
async def async_client(base_url):
    async with openai.AsyncOpenAI(base_url=base_url, api_key="key", max_retries=0) as client:
        yield client


def test_chat(client):
    answer = client.chat.completions.create(model=MODEL, messages=HELLO, temperature=0)
    assert answer.object == "chat.completion"
    assert answer.choices[0].message.content == REPLY
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.prompt_tokens_details.cached_tokens == 16
    assert answer._request_id
    # The answer goes back as it is in the next turn.
    turns = [*HELLO, answer.choices[0].message, {"role": "user", "content": [{"type": "text", "text": "more"}]}]
    assert (
        client.chat.completions.create(model=MODEL, messages=turns, max_completion_tokens=3).usage.completion_tokens
        == 3
    )


def test_chat_stream(client):
    stream = client.chat.completions.create(
        model=MODEL, messages=HELLO, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == REPLY
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-1].usage.completion_tokens == len(REPLY.encode()) + 1


def test_chat_stream_helper(client):
    """The client's own accumulator understands the chunks."""
    with client.chat.completions.stream(
        model=MODEL, messages=HELLO, temperature=0, logprobs=True, top_logprobs=2, stop="s"
    ) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"content.delta", "content.done", "logprobs.content.delta"} <= kinds
    assert final.choices[0].message.content == "Pari"
    assert [token.token for token in final.choices[0].logprobs.content] == [*"Paris"]


def test_chat_logprobs(client):
    answer = client.chat.completions.create(
        model=MODEL, messages=HELLO, temperature=0, max_tokens=2, logprobs=True, top_logprobs=2, n=2
    )
    content = answer.choices[1].logprobs.content
    assert [t.token for t in content] == ["P", "a"]
    assert content[0].bytes == [80]
    assert [(t.token, t.logprob) for t in content[0].top_logprobs] == [("Q", -0.5), ("P", -1.0)]


def test_completion(client):
    answer = client.completions.create(
        model=MODEL, prompt=["ab", "c"], temperature=0, max_tokens=3, logprobs=1, echo=True, n=2
    )
    assert [c.text for c in answer.choices] == ["abPar", "abPar", "cPar", "cPar"]
    assert answer.choices[3].logprobs.tokens == ["c", "P", "a", "r"]
    assert answer.choices[3].logprobs.token_logprobs == [None, -1.0, -1.0, -1.0]
    assert answer.choices[3].logprobs.text_offset == [0, 1, 2, 3]


def test_completion_stream(client):
    stream = client.completions.create(
        model=MODEL,
        prompt="x",
        temperature=0,
        max_tokens=5,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True, "top_k": 5, "priority": 1},
    )
    chunks = list(stream)
    assert "".join(c.choices[0].text for c in chunks if c.choices) == "Paris"
    assert chunks[-1].usage.completion_tokens == 5


async def test_async(async_client):
    answer = await async_client.chat.completions.create(model=MODEL, messages=HELLO, temperature=0, stop="naïve")
    assert answer.choices[0].message.content == "Paris, "
    stream = await async_client.chat.completions.create(model=MODEL, messages=HELLO, temperature=0, stream=True)
    assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == REPLY
    answer = await async_client.completions.create(model=MODEL, prompt=[65, 66], temperature=0, max_tokens=2)
    assert answer.choices[0].text == "Pa"
    stream = await async_client.completions.create(model=MODEL, prompt="x", temperature=0, stream=True)
    assert "".join([chunk.choices[0].text async for chunk in stream]) == REPLY[:15]


def test_models(client):
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_errors_are_the_clients_own(client, base_url):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=HELLO, temperature=3)
    assert (caught.value.param, caught.value.type) == ("temperature", "invalid_request_error")
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=10_000)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            model=MODEL, messages=HELLO, tools=[{"type": "function", "function": {"name": "f"}}]
        )
    assert caught.value.param == "tools"
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="other", prompt="x")
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=base_url, api_key="wrong", max_retries=0).models.list()


@pytest.mark.parametrize(
    ("options", "raised"),
    [
        ({"refuse_with": QueueFullError("full", retry_after_s=1)}, openai.RateLimitError),
        ({"refuse_with": EngineUnavailableError("starting")}, openai.InternalServerError),
        ({"crash_after": 0}, openai.InternalServerError),
    ],
)
def test_server_errors_are_the_clients_own(options, raised):
    with serve(create_app(lambda: FakeEngine(**options))) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        for stream in (False, True):
            with pytest.raises(raised):
                client.chat.completions.create(model=MODEL, messages=HELLO, stream=stream)


def test_too_large_a_body():
    limits = HttpLimits(max_body_bytes=1000)
    with serve(create_app(FakeEngine, get_limits=lambda: limits)) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.APIStatusError) as caught:
            client.completions.create(model=MODEL, prompt="x" * 2000)
        assert caught.value.status_code == 413


def test_an_error_in_mid_stream_reaches_the_client():
    engine = FakeEngine(error_after=3)
    with serve(create_app(lambda: engine)) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        stream = client.completions.create(model=MODEL, prompt="x", temperature=0, stream=True)
        chunks = iter(stream)
        assert [next(chunks).choices[0].text for _ in range(3)] == [*"Par"]
        with pytest.raises(openai.APIError, match="A stage was lost"):
            next(chunks)


def test_a_retry_after_429_succeeds():
    engine = FakeEngine(refuse_with=QueueFullError("full", retry_after_s=1))
    refusals = 0

    def get_engine():
        nonlocal refusals
        refusals += 1
        if refusals > 1:
            engine.refuse_with = None
        return engine

    with serve(create_app(get_engine)) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=1)
        assert client.completions.create(model=MODEL, prompt="x", temperature=0, max_tokens=1).choices[0].text == "P"
    assert refusals == 2


def test_a_client_that_closes_its_stream_aborts():
    engine = FakeEngine(token_delay_s=0.01)
    with serve(create_app(lambda: engine)) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        with client.completions.create(
            model=MODEL, prompt="x", max_tokens=400, stream=True, extra_body={"ignore_eos": True}
        ) as stream:
            next(iter(stream))
        assert engine.has_aborted.wait(60)
    assert len(engine.aborted) == 1
