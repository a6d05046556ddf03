"""The routes under /flexpipe/drain."""

import msgspec
import pytest
from fake_drains import NODES
from http_client import error_of, json_of

from flexpipe_serve.placement.drain import DrainRecord, DrainRequest, DrainState


async def test_start_follow_and_undo(client, engine):
    body = {"node": NODES[0], "deadline_s": 20, "reason": "spot"}
    record = msgspec.convert(json_of(await client.post("/flexpipe/drain", json=body), 202), DrainRecord)
    assert engine.drain_requests == [DrainRequest(node=NODES[0], deadline_s=20, reason="spot")]
    assert record.state is DrainState.DRAINING
    assert record.holds_router
    states = []
    while not record.is_over:
        record = msgspec.convert(json_of(await client.get(f"/flexpipe/drain/{NODES[0]}")), DrainRecord)
        states.append((record.state.value, len(record.stages)))
    assert states == [("draining", 2), ("draining", 1), ("empty", 0)]
    listed = json_of(await client.get("/flexpipe/drain"))
    assert [entry["node"] for entry in listed["data"]] == [NODES[0]]
    assert json_of(await client.delete(f"/flexpipe/drain/{NODES[0]}"))["state"] == "empty"
    assert json_of(await client.get("/flexpipe/drain")) == {"object": "list", "data": []}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, None),
        ({"node": NODES[0], "deadline_s": 0}, "deadline_s"),
        ({"node": NODES[0], "deadline_s": "soon"}, "deadline_s"),
        ({"node": NODES[0], "reason": "x" * 201}, "reason"),
        ({"node": NODES[0], "when": 3}, "when"),
        ({"node": "c"}, "node"),
    ],
)
async def test_what_is_wrong_is_named(client, engine, body, param):
    error = error_of(await client.post("/flexpipe/drain", json=body), 400)
    assert param is None or error["param"] == param
    assert engine.drain_requests == []


async def test_a_node_that_is_not_drained(client, engine):
    for call in (client.get, client.delete):
        error = error_of(await call(f"/flexpipe/drain/{NODES[1]}"), 404)
        assert error["code"] == "drain_not_found"
    engine.drained_by_ray = NODES[1]
    error = error_of(await client.delete(f"/flexpipe/drain/{NODES[1]}"), 400)
    assert error["code"] == "refactor_refused"


async def test_without_another_node(client):
    await client.post("/flexpipe/drain", json={"node": NODES[0]})
    error = error_of(await client.post("/flexpipe/drain", json={"node": NODES[1]}), 400)
    assert error["code"] == "refactor_refused"
