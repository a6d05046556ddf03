"""Everything but generation: models, health, tokenizer, keys, request ids, the published schema."""

import threading

import jsonschema
import msgspec
import pytest
from fake_engine import FakeEngine
from http_client import client_of
from status_samples import server_status

from flexpipe_serve import __version__
from flexpipe_serve.engine.status import ServerStatus


async def test_models(client):
    model = {
        "id": "fake/model",
        "object": "model",
        "created": 1_700_000_000,
        "owned_by": "flexpipe-serve",
        "max_model_len": 512,
    }
    assert (await client.get("/v1/models")).json() == {"object": "list", "data": [model]}
    # A hub id has a slash, escaped or not.
    assert (await client.get("/v1/models/fake/model")).json() == model
    assert (await client.get("/v1/models/fake%2Fmodel")).json() == model


async def test_health(client, engine):
    assert (await client.get("/health")).status_code == 200
    engine.healthy = False
    response = await client.get("/health")
    assert (response.status_code, response.json()["error"]["code"]) == (503, "engine_unavailable")


@pytest.mark.parametrize(("method", "path"), [("HEAD", "/health"), ("GET", "/ping"), ("POST", "/ping")])
async def test_other_ways_to_ask_for_health(client, engine, method, path):
    assert (await client.request(method, path)).status_code == 200
    engine.healthy = False
    assert (await client.request(method, path)).status_code == 503


async def test_version(client):
    assert (await client.get("/version")).json() == {"version": __version__}


async def test_status(client):
    content = (await client.get("/flexpipe/status")).content
    assert msgspec.json.decode(content, type=ServerStatus) == server_status()


async def test_welcome(client):
    response = await client.get("/")
    assert response.headers["content-type"].startswith("text/html")
    assert "http://test/v1/chat/completions" in response.text
    assert 'href="docs"' in response.text


async def test_the_welcome_page_does_not_trust_the_host_header(client):
    response = await client.get("/", headers={"host": "x<script>"})
    assert "<script>" not in response.text


async def test_tokenize(client, engine):
    answer = (await client.post("/tokenize", json={"prompt": "aé", "return_token_strs": True})).json()
    ids = engine.tokenizer.encode("aé")
    assert answer == {"count": 3, "max_model_len": 512, "tokens": ids, "token_strs": ["a", "\ufffd", "\ufffd"]}
    messages = [{"role": "user", "content": "x"}]
    for generation_prompt in (True, False):
        body = {"messages": messages, "add_generation_prompt": generation_prompt}
        answer = (await client.post("/tokenize", json=body)).json()
        expected = engine.tokenizer.apply_chat_template(messages, add_generation_prompt=generation_prompt)
        assert (answer["tokens"], answer["token_strs"]) == (expected, None)
    for body in ({}, {"prompt": "x", "messages": messages}, {"messages": []}, {"prompt": 1}, {"prompt": "x", "no": 1}):
        assert (await client.post("/tokenize", json=body)).status_code == 400
    assert (await client.post("/tokenize", json={"prompt": "x", "model": "other"})).status_code == 404


async def test_tokenize_a_long_text(client):
    answer = (await client.post("/tokenize", json={"prompt": "x" * 100_000})).json()
    assert answer["count"] == 100_000


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {"prompt": "x" * 5000}),
        ("/v1/completions", {"prompt": "x" * 5000}),
        ("/v1/completions", {"prompt": ["x" * 100] * 50}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x" * 5000}]}),
    ],
)
async def test_long_texts_are_tokenised_off_the_event_loop(path, body, monkeypatch):
    engine = FakeEngine(max_model_len=10_000)
    encode, threads = engine.tokenizer.encode, set()

    def record(text, **options):
        threads.add(threading.current_thread())
        return encode(text, **options)

    monkeypatch.setattr(engine.tokenizer, "encode", record)
    async with client_of(engine) as client:
        assert (await client.post(path, json={**body, "max_tokens": 1} if "v1" in path else body)).status_code == 200
        assert threading.current_thread() not in threads
        assert (await client.post("/v1/completions", json={"prompt": "short"})).status_code == 200
        assert threading.current_thread() in threads


async def test_detokenize(client, engine):
    response = await client.post("/detokenize", json={"tokens": engine.tokenizer.encode("aé😀")})
    assert response.json() == {"prompt": "aé😀"}
    assert (await client.post("/detokenize", json={"tokens": []})).json() == {"prompt": ""}
    for tokens in ([264], [-1], [2**70], ["a"], "a", None):
        assert (await client.post("/detokenize", json={"tokens": tokens})).status_code == 400


PATHS = ["/", "/docs", "/openapi.json", "/v1/models", "/v1/models/x", "/flexpipe/status", "/nothing"]


async def test_api_keys(engine):
    async with client_of(engine, api_keys=("first", "sécond")) as client:
        assert (await client.get("/health")).status_code == 200
        assert (await client.options("/v1/models")).status_code == 405
        for path in PATHS:
            response = await client.get(path)
            assert response.status_code == 401
            assert response.headers["www-authenticate"] == "Bearer"
            assert response.headers["x-request-id"]
            assert response.json()["error"]["code"] == "invalid_api_key"
        for value in ("Bearer third", "Bearer", "Bearer ", "first", "Basic first", "Bearer firs", "Bearer first x"):
            assert (await client.get("/v1/models", headers={"authorization": value})).status_code == 401
        for value in ("Bearer first", "bearer first", "Bearer  first"):
            assert (await client.get("/v1/models", headers={"authorization": value})).status_code == 200
        assert (await client.post("/v1/completions", json={"prompt": "x"})).status_code == 401
        assert engine.started == []


async def test_api_keys_outside_ascii(engine):
    async with client_of(engine, api_keys=("sécond",)) as client:
        headers = [(b"authorization", "Bearer sécond".encode())]
        assert (await client.get("/v1/models", headers=headers)).status_code == 200
        assert (await client.get("/v1/models", headers=[(b"authorization", b"Bearer s\xff")])).status_code == 401


async def test_request_ids(client):
    assert (await client.get("/health", headers={"X-Request-Id": "a-1.b:2"})).headers["x-request-id"] == "a-1.b:2"
    dirty = await client.get("/health", headers={"X-Request-Id": "x y\t<z>;" + "l" * 500})
    assert dirty.headers["x-request-id"] == "xyz" + "l" * 125
    generated = [(await client.get("/health")).headers["x-request-id"] for _ in range(2)]
    assert generated[0] != generated[1]
    assert (await client.get("/health", headers={"X-Request-Id": "<>"})).headers["x-request-id"]


async def test_equal_request_ids_do_not_collide_in_the_engine(client, engine):
    for _ in range(2):
        await client.post("/v1/completions", json={"prompt": "x"}, headers={"X-Request-Id": "same"})
    assert len(set(engine.started)) == 2


async def test_no_cors(client):
    response = await client.get("/health", headers={"origin": "http://elsewhere"})
    assert not any(name.startswith("access-control") for name in response.headers)


async def test_published_schema(client):
    document = (await client.get("/openapi.json")).json()
    schemas = document["components"]["schemas"]

    def check(instance, name):
        jsonschema.validate(instance, {"$ref": f"#/components/schemas/{name}", "components": {"schemas": schemas}})

    for path, body, answer in [
        ("/v1/completions", {"prompt": "x", "logprobs": 2, "echo": True, "logit_bias": {"1": 2}}, "Completion"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "logprobs": True}, "ChatCompletion"),
        ("/tokenize", {"prompt": "x"}, "TokenizeAnswer"),
        ("/detokenize", {"tokens": [1]}, "DetokenizeAnswer"),
    ]:
        operation = document["paths"][path]["post"]
        request = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"].rsplit("/", 1)[1]
        check(body, request)
        with pytest.raises(jsonschema.ValidationError):
            check({**body, "unknown": 1}, request)
        described = operation["responses"]["200"]["content"]["application/json"]["schema"]["$ref"]
        assert described == f"#/components/schemas/{answer}"
        response = await client.post(path, json=body)
        assert response.status_code == 200
        check(response.json(), answer)
        check((await client.post(path, json={})).json(), "ErrorAnswer")
        assert "400" in operation["responses"]
        assert "422" not in operation["responses"]
