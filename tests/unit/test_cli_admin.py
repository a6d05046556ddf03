"""``flexpipe status``, ``events`` and ``refactor`` against a real HTTP server over the fake engine."""

import io
import json

import msgspec
import pytest
from fake_engine import FakeEngine
from http_server import serve
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from status_samples import pipeline_status, server_status, stage

from flexpipe_serve import async_handle, cli_views
from flexpipe_serve.cli import main
from flexpipe_serve.cli_views import RefactorProgress, layer_ranges, seconds, size
from flexpipe_serve.deployments.api import create_app
from flexpipe_serve.engine.scale_record import ScaleRequest
from flexpipe_serve.engine.status import ServerStatus
from flexpipe_serve.errors import EngineUnavailableError, RefactorRefusedError
from flexpipe_serve.refactor.record import Mode, Phase, RefactorRequest

STAGE = stage(
    node="a" * 56, pid=4711, layers=(0, 15), num_layers=15, weights_bytes=311 << 20, kv_bytes=3 << 29, num_steps=24
)
PIPELINE = pipeline_status(
    stages=[STAGE],
    epoch=7,
    kv={"num_used_blocks": 5, "num_blocks": 20, "use": 0.25, "num_cached_blocks": 2, "max_tokens": 320},
    queue={"num_running": 3, "num_waiting": 1, "num_steps_in_flight": 2},
)
STATUS = server_status(PIPELINE, model="fake/model", config_error="stages is 99.")


@pytest.fixture(autouse=True)
def _no_pause_between_looks(monkeypatch):
    monkeypatch.setattr(async_handle, "_POLL_S", 0.0)


@pytest.fixture
def url(engine):
    with serve(create_app(lambda: engine)) as url:
        yield url


@pytest.fixture
def run(url, capsys):
    """Runs a command; gives its exit status, stdout and stderr."""

    def run(*args):
        status = main([*args, "--url", url])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def test_status(run, engine, monkeypatch):
    monkeypatch.setattr(engine, "status", lambda: STATUS)
    status, out, _ = run("status")
    assert status == 0
    lines = out.splitlines()
    assert lines[0] == "config error: stages is 99."
    assert lines[1] == "fake/model  serving  epoch 7"
    stage = "stage-0 aaaaaaaa… 4711 cpu 0-14 311 MiB 1.5 GiB 0 B 24"
    assert lines[3].split() == stage.split()
    assert "5 of 20 blocks used (25.0%), 2 cached; room for 320 tokens" in out
    assert "3 running, 1 waiting, 2 steps in flight, 0 preemptions" in out
    assert "\x1b" not in out
    assert msgspec.json.decode(run("status", "--json")[1], type=ServerStatus) == STATUS


def test_status_of_several_pipelines(run, engine, monkeypatch):
    second = pipeline_status(pipeline=1, state="unavailable", reason="a stage was lost.", epoch=2)
    monkeypatch.setattr(engine, "status", lambda: server_status(PIPELINE, second, model="fake/model"))
    lines = run("status")[1].splitlines()
    assert lines[0] == "fake/model  pipeline 0  serving  epoch 7"
    assert "fake/model  pipeline 1  unavailable  epoch 2" in lines
    assert lines.count("reason: a stage was lost.") == 1


def test_scale(run, engine):
    status, out, err = run("scale", "--pipelines", "2")
    assert (status, err) == (0, "")
    assert engine.scale_requests == [ScaleRequest(pipelines=2)]
    assert out.splitlines()[0] == "1 → 2 pipelines after 1.25 s"
    assert [line.split() for line in out.splitlines()[2:]] == [["0", "15", "2000"], ["1", "15", "2000"]]
    status, out, _ = run("scale", "--layouts", "1", "10,20", "9,")
    assert [layout.boundaries for layout in engine.scale_requests[1].layouts] == [None, (10, 20), (9,)]
    assert out.splitlines()[2].split() == ["0", "one", "stage", "1333"]
    assert run("scale", "--pipelines", "1")[1].startswith("3 → 1 pipelines after 1.25 s; 6 sequences go on")
    status, _, err = run("scale", "--pipelines", "0")
    assert (status, err) == (1, "error: pipelines asks for 0 pipelines; there can be 1 to 64.\n")
    engine.refuse_scale_with = RefactorRefusedError("There is no room.")
    assert run("scale", "--pipelines", "3")[2] == "error: There is no room.\n"


def test_refactor(run, engine):
    status, out, err = run("refactor", "--stages", "3")
    assert (status, err) == (0, "")
    (request,) = engine.requests
    assert (request.stages, request.boundaries, request.mode, request.dry_run) == (3, None, Mode.LIVE, False)
    assert "0-14 | 15-29  →  0-9 | 10-19 | 20-29" in out
    printed = [line.split()[0] for line in out.splitlines() if line.endswith(" 500.0 ms")]
    assert [phase for phase in printed if phase in list(Phase)] == list(Phase)[1:]
    assert "done r-1 (live) after 2.50 s" in out
    assert "15 in 2 moves" in out
    assert "20.0 MiB snapshot, 1.0 MiB patches" in out
    assert "0.6 ms in all, 0.4 ms the longest step" in out
    assert "4281 → 4100 blocks" in out
    assert "\x1b" not in out


def test_boundaries_and_mode(run, engine):
    assert run("refactor", "--boundaries", "5,20", "--mode", "sync")[0] == 0
    assert (engine.requests[0].boundaries, engine.requests[0].mode) == ((5, 20), Mode.SYNC)


def test_dry_run(run, engine):
    status, out, _ = run("refactor", "--stages", "3", "--dry-run")
    assert status == 0
    assert "fits: node-a needs 2.1 of 4.0 GiB." in out
    rows = [line.split() for line in out.splitlines()]
    assert ["10-14", "stage-0", "stage-1", "shared,", "nothing", "to", "copy"] in rows
    assert ["20-29", "stage-1", "stage-2", "copied"] in rows
    assert ["node-a", "700", "MiB", "900", "MiB", "560", "MiB", "2.1", "GiB", "4.0", "GiB"] in rows
    assert "140 MiB of weights to load, 20.0 MiB of KV to copy; KV blocks 4281 → 4000 → 4100" in out
    assert "starts stage-2" in out
    status, out, _ = run("refactor", "--stages", "11", "--dry-run")
    assert status == 1
    assert "refused: node-a needs 5.0 GiB" in out
    assert engine.refactorings() == []


def test_no_wait(run, engine, url):
    status, out, _ = run("refactor", "--stages", "3", "--no-wait")
    assert status == 0
    assert f"refactoring r-1 has started; {url}/flexpipe/refactor/r-1 has its record" in out
    assert not engine.refactorings()[0].is_over


def test_ctrl_c_cancels(run, engine, monkeypatch):
    engine.hold_at = Phase.COPY
    update, num_updates = RefactorProgress.update, 0

    def interrupted(self, record):
        nonlocal num_updates
        num_updates += 1
        update(self, record)
        if num_updates == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(RefactorProgress, "update", interrupted)
    status, out, _ = run("refactor", "--stages", "3")
    assert status == 1
    assert "asked the server to cancel r-1" in out
    assert "aborted r-1 (live)" in out
    assert "why: it was cancelled." in out


@pytest.mark.parametrize(
    ("raised", "args", "message"),
    [
        (None, ("refactor", "--stages", "11"), "error: node-a needs 5.0 GiB, its budget is 4.0 GiB."),
        (None, ("refactor", "--stages", "0"), "error: stages is 0; it must be at least 1."),
        (EngineUnavailableError("[Starting]."), ("refactor", "--stages", "3"), "error: [Starting]."),
    ],
)
def test_what_is_refused(run, engine, raised, args, message):
    engine.refuse_refactor_with = raised
    status, out, err = run(*args)
    assert (status, out, err.strip()) == (1, "", message)


def test_busy(run):
    run("refactor", "--stages", "3", "--no-wait")
    status, _, err = run("refactor", "--stages", "2")
    assert status == 1
    assert "r-1 is running" in err


def test_nobody_answers(capsys):
    assert main(["status", "--url", "http://127.0.0.1:9"]) == 1
    assert "http://127.0.0.1:9 does not answer" in capsys.readouterr().err


def test_an_api_key(engine, capsys, monkeypatch):
    monkeypatch.setattr(engine, "status", lambda: STATUS)
    with serve(create_app(lambda: engine, api_keys=("key",))) as url:
        assert main(["status", "--url", url]) == 1
        assert "API key" in capsys.readouterr().err
        assert main(["status", "--url", url, "--api-key", "key"]) == 0
        monkeypatch.setenv("FLEXPIPE_API_KEY", "key")
        assert main(["status", "--url", url]) == 0


@pytest.mark.parametrize(
    "args",
    [("refactor",), ("refactor", "--stages", "2", "--boundaries", "3"), ("refactor", "--boundaries", "a,b")],
)
def test_wrong_arguments(args, capsys):
    with pytest.raises(SystemExit) as raised:
        main(args)
    assert raised.value.code == 2
    assert capsys.readouterr().err


def test_events(run):
    run("refactor", "--stages", "3", "--no-wait")
    status, out, _ = run("events")
    assert status == 0
    assert [line.split()[2:] for line in out.splitlines()[1:]] == [
        ["started", "2", "stages."],
        ["refactoring", "started", "r-1."],
    ]


async def test_bars_on_a_terminal():
    engine = FakeEngine()
    record = await engine.refactor(RefactorRequest(stages=3))
    console = Console(file=io.StringIO(), force_terminal=True, width=100, _environ={})
    with RefactorProgress(console) as progress:
        while record.phase is not Phase.MIRROR:
            record = engine.refactoring("r-1")
        record.phases = [time for time in record.phases if time.phase is not Phase.COPY]  # within one domain
        progress.update(record)
        rows = {task.description: task for task in progress._progress.tasks}
        states = {name: (task.completed, task.fields["state"]) for name, task in rows.items()}
    assert states == {
        "prepare": (1.0, "500.0 ms"),
        "copy": (0.0, "not needed"),
        "mirror": (0.5, "50%"),
        "switch": (0.0, ""),
        "retire": (0.0, ""),
    }
    assert "━" in console.file.getvalue()


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (311 << 20, "311 MiB"),
        (3 << 29, "1.5 GiB"),
        (5 << 40, "5120 GiB"),
    ],
)
def test_sizes(num_bytes, text):
    assert size(num_bytes) == text


def test_times():
    assert [seconds(value) for value in (0.0004, 0.25, 1.0, 62.5)] == ["0.4 ms", "250.0 ms", "1.00 s", "62.50 s"]


@settings(deadline=None)  # a busy machine is no failure
@given(st.sets(st.integers(0, 60)).map(sorted))
def test_layer_ranges_name_each_layer_once(layers):
    named = []
    for part in filter(None, layer_ranges(layers).split(", ")):
        first, _, last = part.partition("-")
        named += range(int(first), int(last or first) + 1)
    assert named == layers
    assert cli_views.layer_ranges([3, 4, 5, 9]) == "3-5, 9"


def test_decisions(run, engine):
    status, out, _ = run("decisions")
    header, line = out.splitlines()
    assert status == 0
    assert header.split() == ["time", "verdict", "trigger", "req/s", "why", "refactoring"]
    assert line.split()[2:5] == ["move", "asked", "1.50"]
    assert "1 stage has no hops." in line
    (decision,) = json.loads(run("decisions", "--json")[1])
    assert decision["verdict"] == "move"
    assert len(decision["candidates"]) == 2


def test_an_address_without_a_scheme_is_a_server_too(url, engine, capsys):
    assert main(["events", "--url", url.removeprefix("http://")]) == 0
    assert main(["events", "--url", "127.0.0.1:1"]) == 1
    assert "http://127.0.0.1:1 does not answer" in capsys.readouterr().err
