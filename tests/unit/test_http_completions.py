"""/v1/completions: parameters in, OpenAI's shapes out."""

from fake_engine import REPLY
from http_client import client_of, events_of, json_of


async def complete(client, **body):
    return json_of(await client.post("/v1/completions", json={"model": "fake/model", "temperature": 0, **body}))


async def events(client, **body):
    return events_of(await client.post("/v1/completions", json={"temperature": 0, "stream": True, **body}))


async def test_shape(client):
    answer = await complete(client, prompt="x" * 20, max_tokens=5)
    assert answer.pop("id").startswith("cmpl-")
    assert answer == {
        "object": "text_completion",
        "created": answer["created"],
        "model": "fake/model",
        "choices": [{"index": 0, "text": "Paris", "logprobs": None, "finish_reason": "length", "stop_reason": None}],
        "usage": {
            "prompt_tokens": 20,
            "completion_tokens": 5,
            "total_tokens": 25,
            "prompt_tokens_details": {"cached_tokens": 16},
        },
    }


async def test_defaults(client, engine):
    response = await client.post("/v1/completions", json={"prompt": "hi"})
    assert response.status_code == 200
    params = engine.params[0]
    assert (params.max_tokens, params.temperature, params.top_p, params.top_k) == (16, 1.0, 1.0, 0)
    assert params.num_logprobs is None


async def test_end_of_sequence(client):
    choice = (await complete(client, prompt="hi", max_tokens=100))["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == (REPLY, "stop", None)


async def test_parameters_reach_the_engine(client, engine):
    await complete(
        client,
        prompt="hi",
        max_tokens=7,
        temperature=0.5,
        top_p=0.9,
        top_k=10**9,
        min_p=0.1,
        seed=-1,
        presence_penalty=-1,
        frequency_penalty=1.5,
        repetition_penalty=1.1,
        logit_bias={"12": -100, "13": 5},
        stop="zzz",
        stop_token_ids=[3],
        ignore_eos=True,
        include_stop_str_in_output=True,
        logprobs=4,
        priority=-3,
        user="somebody",
    )
    params = engine.params[0]
    assert engine.priorities == [-3]
    assert 0 <= params.seed < 2**62
    assert params.top_k == engine.model.vocab_size
    assert (params.max_tokens, params.temperature, params.top_p, params.min_p) == (7, 0.5, 0.9, 0.1)
    assert (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) == (-1, 1.5, 1.1)
    assert params.logit_bias == {12: -100, 13: 5}
    assert (params.stop, params.stop_token_ids, params.num_logprobs) == (("zzz",), (3,), 4)
    assert params.ignore_eos
    assert params.include_stop_str_in_output


async def test_null_is_absent_and_neutral_values_pass(client):
    fields = ["max_tokens", "n", "stop", "seed", "stream", "stream_options", "logit_bias", "suffix", "best_of", "user"]
    answer = await complete(client, prompt="hi", **dict.fromkeys(fields), model=None)
    assert len(answer["choices"]) == 1
    await complete(client, prompt="hi", suffix="", best_of=1, min_tokens=0, skip_special_tokens=True)
    await complete(
        client,
        prompt="hi",
        response_format={"type": "text"},
        metadata={"any": ["thing"]},
        logit_bias={"1": 2},
        use_beam_search=False,
    )


async def test_every_form_of_prompt(client, engine):
    ids = engine.tokenizer.encode("abc")
    for prompt, count in [("abc", 1), (["abc"], 1), (ids, 1), ([ids], 1), (["abc", "d"], 2), ([ids, ids[:1]], 2)]:
        answer = await complete(client, prompt=prompt, max_tokens=5)
        assert [c["index"] for c in answer["choices"]] == list(range(count))
        assert {c["text"] for c in answer["choices"]} == {"Paris"}
        assert answer["usage"]["prompt_tokens"] == (3 if count == 1 else 4)
        assert answer["usage"]["completion_tokens"] == 5 * count


async def test_n_and_several_prompts_are_indexed_prompt_first(client, engine):
    answer = await complete(client, prompt=["ab", "cdef"], n=2, temperature=1, seed=0, max_tokens=4, echo=True)
    assert [c["index"] for c in answer["choices"]] == [0, 1, 2, 3]
    assert [c["text"] for c in answer["choices"]] == ["abPari", "abaris", "cdefPari", "cdefaris"]
    assert answer["usage"]["prompt_tokens"] == 6
    assert answer["usage"]["completion_tokens"] == 16
    assert len(engine.started) == 2


async def test_equal_prompts_without_a_seed_differ(client, engine):
    await complete(client, prompt=["same", "same"], temperature=1)
    assert engine.params[0].seed != engine.params[1].seed
    await complete(client, prompt=["same", "same"], temperature=1, seed=5)
    assert [p.seed for p in engine.params[2:]] == [5, 5]


async def test_stop(client):
    choice = (await complete(client, prompt="hi", stop=[", n", "zz"]))["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("Paris", "stop", ", n")
    choice = (await complete(client, prompt="hi", stop=", n", include_stop_str_in_output=True))["choices"][0]
    assert choice["text"] == "Paris, n"


async def test_stop_token_id(client, engine):
    comma = engine.tokenizer.encode(",")[0]
    choice = (await complete(client, prompt="hi", stop_token_ids=[comma]))["choices"][0]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", comma)


async def test_echo_of_token_ids_is_their_text(client, engine):
    answer = await complete(client, prompt=engine.tokenizer.encode("é!"), echo=True, max_tokens=2)
    assert answer["choices"][0]["text"] == "é!Pa"


async def test_echo_alone_scores_the_prompt(client):
    answer = await complete(client, prompt="abc", echo=True, max_tokens=0, logprobs=0)
    choice = answer["choices"][0]
    assert choice["text"] == "abc"
    assert choice["finish_reason"] == "length"
    assert choice["logprobs"] == {
        "text_offset": [0, 1, 2],
        "token_logprobs": [None, -1.0, -1.0],
        "tokens": ["a", "b", "c"],
        "top_logprobs": [None, {"b": -1.0}, {"c": -1.0}],
    }
    assert answer["usage"]["completion_tokens"] == 0


async def test_logprobs(client):
    choice = (await complete(client, prompt="q", max_tokens=2, logprobs=3, echo=True))["choices"][0]
    logprobs = choice["logprobs"]
    assert choice["text"] == "qPa"
    assert logprobs["tokens"] == ["q", "P", "a"]
    assert logprobs["text_offset"] == [0, 1, 2]
    assert logprobs["token_logprobs"] == [None, -1.0, -1.0]
    # The chosen token is among them; minus infinity has a number.
    assert logprobs["top_logprobs"][1] == {"Q": -0.5, "P": -1.0, "S": -9999.0}


async def test_the_chosen_token_is_always_among_the_top(client):
    choice = (await complete(client, prompt="q", max_tokens=1, logprobs=1))["choices"][0]
    assert choice["logprobs"]["top_logprobs"] == [{"Q": -0.5, "P": -1.0}]


async def test_logprobs_of_parts_of_a_character(client):
    """A token that is half a character is named by its bytes, and shares the character's offset."""
    choice = (await complete(client, prompt="q", max_tokens=12, logprobs=0))["choices"][0]
    assert choice["text"] == "Paris, naïve"[:11]
    tokens, offsets = choice["logprobs"]["tokens"], choice["logprobs"]["text_offset"]
    assert tokens == [*"Paris, na", "bytes:\\xc3", "bytes:\\xaf", "v"]
    assert offsets == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 10]


async def test_stream_joins_to_the_whole(client):
    whole = await complete(client, prompt=["ab", "c"], n=2, max_tokens=30, temperature=1, seed=3, echo=True)
    chunks = await events(client, prompt=["ab", "c"], n=2, max_tokens=30, temperature=1, seed=3, echo=True)
    assert len({chunk["id"] for chunk in chunks}) == 1
    for choice in whole["choices"]:
        pieces = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        assert "".join(p["text"] for p in pieces) == choice["text"]
        assert [p["finish_reason"] for p in pieces[:-1]] == [None] * (len(pieces) - 1)
        assert pieces[-1]["finish_reason"] == choice["finish_reason"]
    assert all("usage" not in chunk for chunk in chunks)


async def test_stream_chunk_shape(client):
    chunks = await events(client, prompt="hi", max_tokens=2)
    assert chunks[0] == {
        "id": chunks[0]["id"],
        "object": "text_completion",
        "created": chunks[0]["created"],
        "model": "fake/model",
        "choices": [{"index": 0, "text": "P", "logprobs": None, "finish_reason": None, "stop_reason": None}],
    }
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["P", "a"]


async def test_stream_never_sends_empty_chunks_or_half_characters(client):
    chunks = await events(client, prompt="hi", max_tokens=100)
    texts = [chunk["choices"][0]["text"] for chunk in chunks]
    assert "".join(texts) == REPLY
    assert "" not in texts[:-1]
    assert "\ufffd" not in "".join(texts)


async def test_stream_usage(client):
    chunks = await events(client, prompt="hi", max_tokens=3, stream_options={"include_usage": True})
    assert [chunk["usage"] for chunk in chunks[:-1]] == [None] * 3
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == {
        "prompt_tokens": 2,
        "completion_tokens": 3,
        "total_tokens": 5,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


async def test_stream_logprobs_join_to_the_whole(client):
    body = {"prompt": "abé", "max_tokens": 20, "logprobs": 2, "echo": True, "n": 2, "seed": 1, "temperature": 1}
    whole = await complete(client, **body)
    chunks = await events(client, **body)
    for choice in whole["choices"]:
        pieces = [c["logprobs"] for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        for key in ("text_offset", "token_logprobs", "tokens", "top_logprobs"):
            assert [x for piece in pieces for x in piece[key]] == choice["logprobs"][key]
        assert len(choice["logprobs"]["tokens"]) == 4 + 20


async def test_model_name_is_escaped_in_chunks(engine):
    """A name that holds JSON must not break the prepared chunks."""
    object.__setattr__(engine.model, "name", 'a"text":""b\\')
    async with client_of(engine) as client:
        chunks = await events(client, prompt="hi", max_tokens=2)
    assert [c["model"] for c in chunks] == ['a"text":""b\\'] * 2
    assert chunks[0]["choices"][0]["text"] == "P"
