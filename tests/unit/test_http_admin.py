"""The routes under /flexpipe: refactorings and events."""

import jsonschema
import msgspec
import pytest
from http_client import client_of, error_of, json_of

from flexpipe_serve.engine.scale_record import ScaleRequest
from flexpipe_serve.errors import EngineUnavailableError, RefactorBusyError, RefactorRefusedError
from flexpipe_serve.refactor.record import Mode, Outcome, Phase, RefactorRecord, RefactorRequest


async def start(client, **body):
    return msgspec.convert(json_of(await client.post("/flexpipe/refactor", json=body), 202), RefactorRecord)


async def refused(client, status=400, **body):
    return error_of(await client.post("/flexpipe/refactor", json=body), status)


async def test_start_and_follow(client):
    record = await start(client, stages=3)
    assert (record.outcome, record.phase, record.mode) == (Outcome.RUNNING, Phase.PLAN, Mode.LIVE)
    assert [stage.stop - stage.start for stage in record.plan.new] == [10, 10, 10]
    phases = [record.phase]
    while not record.is_over:
        record = msgspec.convert(json_of(await client.get(f"/flexpipe/refactor/{record.id}")), RefactorRecord)
        phases.append(record.phase)
    assert record.outcome is Outcome.DONE
    assert list(dict.fromkeys(phases)) == list(Phase)
    listed = json_of(await client.get("/flexpipe/refactor"))
    assert listed == {"object": "list", "data": [msgspec.json.decode(msgspec.json.encode(record))]}


async def test_every_field_reaches_the_engine(client, engine):
    body = {
        "boundaries": [10, 20],
        "mode": "sync",
        "resize_kv": False,
        "max_bytes_per_s": 1e6,
        "timeout_s": 5,
        "reason": "because",
    }
    await start(client, **body)
    assert engine.requests == [msgspec.convert(body, RefactorRequest)]
    assert engine.requests[0].boundaries == (10, 20)


async def test_scale(client, engine):
    body = {"layouts": [{"stages": 2}, {"boundaries": [10]}], "reason": "peak"}
    answer = json_of(await client.post("/flexpipe/scale", json=body))
    assert engine.scale_requests == [msgspec.convert(body, ScaleRequest)]
    assert [pipeline["boundaries"] for pipeline in answer["pipelines"]] == [[15], [10]]
    assert len(json_of(await client.post("/flexpipe/scale", json={"pipelines": 1}))["pipelines"]) == 1


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "pipelines"),
        ({"pipelines": 0}, "pipelines"),
        ({"pipelines": "two"}, "pipelines"),
        ({"layouts": []}, "layouts"),
        ({"layouts": [{"stages": 1, "boundaries": []}]}, "layouts"),
        ({"pipelines": 1, "reason": "x" * 201}, "reason"),
    ],
)
async def test_a_wrong_scale_is_named(client, engine, body, param):
    assert error_of(await client.post("/flexpipe/scale", json=body), 400)["param"] == param
    assert engine.scale_requests == []


async def test_scale_without_a_layout_for_it_or_at_the_wrong_time(client, engine):
    body = {"layouts": [{"boundaries": [40]}]}
    assert error_of(await client.post("/flexpipe/scale", json=body), 400)["code"] == "refactor_refused"
    engine.refuse_scale_with = RefactorBusyError("A refactoring is running.")
    assert error_of(await client.post("/flexpipe/scale", json=body), 409)["code"] == "refactor_busy"


async def test_a_single_stage(client):
    record = await start(client, boundaries=[], stages=None, max_bytes_per_s=None)
    assert len(record.plan.new) == 1


async def test_a_dry_run_starts_nothing(client):
    body = {"stages": 3, "dry_run": True}
    record = msgspec.convert(json_of(await client.post("/flexpipe/refactor", json=body)), RefactorRecord)
    assert (record.outcome, record.phase) == (Outcome.DONE, Phase.PLAN)
    body["stages"] = 11
    record = msgspec.convert(json_of(await client.post("/flexpipe/refactor", json=body)), RefactorRecord)
    assert (record.outcome, record.plan.verdict) == (Outcome.REFUSED, "refused")
    assert json_of(await client.get("/flexpipe/refactor"))["data"] == []


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({}, "stages", "Give either stages or boundaries; there are neither."),
        ({"stages": 2, "boundaries": [15]}, "stages", "Give either stages or boundaries; there are both."),
        ({"stages": 0}, "stages", "stages is 0; it must be at least 1."),
        ({"stages": "3"}, "stages", "stages: expected 'int | null', got 'str'."),
        ({"stages": 2**64}, "stages", None),
        ({"stages": 10**4000}, "stages", None),
        (
            {"boundaries": [0]},
            "boundaries",
            "boundaries has 0; the first layer of each later stage must be at least",
        ),
        ({"boundaries": [5, 5]}, "boundaries", "boundaries has 5; the first layer of each later stage must be above"),
        ({"boundaries": [5, 4]}, "boundaries", "above the one before it, 5."),
        ({"boundaries": [5.5]}, "boundaries[0]", None),
        ({"stages": 3, "timeout_s": 0}, "timeout_s", "timeout_s is 0; it must be above 0."),
        ({"stages": 3, "max_bytes_per_s": -1}, "max_bytes_per_s", "max_bytes_per_s is -1; it must be above 0."),
        (
            {"stages": 3, "mode": "fast"},
            "mode",
            "mode: invalid enum value 'fast'; it is one of 'live', 'weights_only', 'sync', 'restart'.",
        ),
        ({"stages": 3, "reason": "x" * 201}, "reason", "reason has 201 characters; at most 200 are kept."),
        ({"stage": 3}, "stage", "Unknown parameter 'stage'. Did you mean 'stages'?"),
        ({"stages": 3, "metadata": 1}, "metadata", "Unknown parameter 'metadata'."),
    ],
    ids=str,
)
async def test_a_bad_body_names_the_field(client, engine, body, param, message):
    error = await refused(client, **body)
    assert error["param"] == param
    assert message is None or message in error["message"]
    assert len(error["message"]) < 1000
    assert engine.requests == []


@pytest.mark.parametrize(
    ("raised", "status", "code"),
    [
        (RefactorRefusedError("Too large."), 400, "refactor_refused"),
        (RefactorBusyError("r-7 is running."), 409, "refactor_busy"),
        (EngineUnavailableError("Starting."), 503, "engine_unavailable"),
    ],
)
async def test_what_the_engine_refuses(client, engine, raised, status, code):
    engine.refuse_refactor_with = raised
    error = await refused(client, status, stages=3)
    assert (error["message"], error["code"]) == (str(raised), code)


async def test_infeasible(client):
    error = await refused(client, stages=11)
    assert (error["message"], error["code"]) == ("node-a needs 5.0 GiB, its budget is 4.0 GiB.", "refactor_refused")


@pytest.mark.parametrize("dry_run", [False, True])
async def test_no_layout_of_this_model(client, dry_run):
    for body, message in (({"stages": 31}, "31 stages for 30 layers"), ({"boundaries": [30]}, "boundary 30 must lie")):
        error = await refused(client, **body, dry_run=dry_run)
        assert error["code"] == "refactor_refused"
        assert message in error["message"]


async def test_a_record_that_says_refused_is_an_error(client, engine, monkeypatch):
    """An engine may answer with the record instead of raising."""
    plan = await engine.refactor(RefactorRequest(stages=11, dry_run=True))

    async def refactor(request):
        return plan

    monkeypatch.setattr(engine, "refactor", refactor)
    assert (await refused(client, stages=11))["code"] == "refactor_refused"


async def test_one_at_a_time(client):
    record = await start(client, stages=3)
    error = await refused(client, 409, stages=2)
    assert error["code"] == "refactor_busy"
    assert record.id in error["message"]


@pytest.mark.parametrize(("hold_at", "outcome"), [(Phase.COPY, Outcome.ABORTED), (Phase.RETIRE, Outcome.RUNNING)])
async def test_cancel(client, engine, hold_at, outcome):
    engine.hold_at = hold_at
    path = f"/flexpipe/refactor/{(await start(client, stages=3)).id}"
    while (json_of(await client.get(path)))["phase"] != hold_at:
        pass
    assert json_of(await client.delete(path), 202)["outcome"] == "running"
    assert json_of(await client.get(path))["outcome"] == outcome


async def test_an_unknown_refactoring(client):
    for method in ("GET", "DELETE"):
        error = error_of(await client.request(method, "/flexpipe/refactor/r-9"), 404)
        assert error["code"] == "refactoring_not_found"
        assert "'r-9'" in error["message"]


async def test_events(client):
    await start(client, stages=3)
    events = json_of(await client.get("/flexpipe/events"))["data"]
    assert [event["kind"] for event in events] == ["started", "refactoring started"]
    assert set(events[0]) == {"time", "kind", "message"}


async def test_keys_are_asked_for(engine):
    async with client_of(engine, api_keys=("key",)) as client:
        for method, path in [
            ("POST", "/flexpipe/refactor"),
            ("GET", "/flexpipe/refactor"),
            ("GET", "/flexpipe/refactor/r-1"),
            ("DELETE", "/flexpipe/refactor/r-1"),
            ("GET", "/flexpipe/events"),
        ]:
            assert error_of(await client.request(method, path), 401)["code"] == "invalid_api_key"
    assert engine.requests == []


async def test_published_schema(client):
    document = (await client.get("/openapi.json")).json()
    components = {"components": document["components"]}
    operation = document["paths"]["/flexpipe/refactor"]["post"]
    schema = operation["requestBody"]["content"]["application/json"]["schema"] | components
    jsonschema.validate({"stages": 3, "mode": "live"}, schema)
    for bad in ({"stages": "3"}, {"mode": "fast"}, {"unknown": 1}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(bad, schema)
    described = operation["responses"]["202"]["content"]["application/json"]["schema"] | components
    jsonschema.validate(json_of(await client.post("/flexpipe/refactor", json={"stages": 3}), 202), described)
    assert {"200", "202", "400", "401", "409", "503"} <= set(operation["responses"])
    assert "422" not in operation["responses"]
