"""``flexpipe drain`` against a real HTTP server over the fake engine."""

import pytest
from fake_drains import NODES
from http_server import serve
from status_samples import node, server_status

from flexpipe_serve import cli_drain
from flexpipe_serve.cli import main
from flexpipe_serve.cli_views import status_view
from flexpipe_serve.deployments.api import create_app
from flexpipe_serve.placement.drain import DrainState


@pytest.fixture
def run(engine, capsys, monkeypatch):
    """Runs ``flexpipe drain``; gives its exit status, stdout and stderr."""
    monkeypatch.setattr(cli_drain, "_POLL_S", 0.0)
    with serve(create_app(lambda: engine)) as url:

        def run(*args):
            status = main(["drain", *args, "--url", url])
            captured = capsys.readouterr()
            return status, captured.out, captured.err

        yield run


def test_it_is_followed_until_the_node_is_empty(run, engine):
    status, out, err = run(NODES[0], "--deadline", "20")
    assert (status, err) == (0, "")
    assert engine.drain_requests[0].deadline_s == 20
    first, last = out.splitlines()
    assert first.split(maxsplit=2)[2] == "node aaaaaaaa… draining: 2 stages stand there."
    assert last.split(maxsplit=2)[2] == "node aaaaaaaa… empty: No stage stands there."
    assert "bbbbbbbb" not in run("--list")[1]
    assert run("--list")[1].splitlines()[1].split()[:2] == ["aaaaaaaa…", "empty"]
    assert run("aaaa", "--undo")[:2] == (0, "stages may be launched on node aaaa again\n")
    assert run("--list")[1].splitlines()[1:] == []


def test_what_is_wrong_is_said_in_a_line(run, engine):
    assert run("nowhere")[::2] == (1, "error: There is no node 'nowhere'.\n")
    status, _, err = run(NODES[1], "--undo")
    assert status == 1
    assert "is not being drained" in err
    assert run(NODES[0], "--deadline", "0")[0] == 1
    with pytest.raises(SystemExit):
        run()


def test_begun_is_enough_where_nobody_waits(run, engine):
    status, out, _ = run(NODES[0], "--no-wait")
    assert (status, len(out.splitlines())) == (0, 1)


def test_a_node_that_was_lost_is_a_failure(run, engine, monkeypatch):
    drains = engine.drains

    def lost():
        records = drains()
        for record in records:
            record.state, record.message = DrainState.LOST, "It was gone before it was empty."
        return records

    monkeypatch.setattr(engine, "drains", lost)
    status, out, _ = run(NODES[0])
    assert status == 1
    assert out.splitlines()[-1].endswith("lost: It was gone before it was empty.")


def test_somebody_may_take_it_back(run, engine, monkeypatch):
    monkeypatch.setattr(engine, "drains", lambda: [])
    status, out, _ = run(NODES[0])
    assert status == 1
    assert out.splitlines()[-1] == "somebody has taken it back"


def test_the_status_shows_nodes_where_there_are_several(capsys):
    from rich.console import Console

    nodes = (node("a", stages=("stage-0", "stage-1")), node("b", draining=True), node("c", alive=False))
    Console(width=120).print(status_view(server_status(pipelines=(), nodes=nodes)))
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line]
    assert lines[1:] == [
        ["a", "10.0.0.1", "-", "z1", "alive", "stage-0,", "stage-1"],
        ["b", "10.0.0.1", "-", "z1", "draining", "-"],
        ["c", "10.0.0.1", "-", "z1", "gone", "-"],
    ]
