"""The comparison with peers, on small servers that are real processes."""

import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from rich.console import Console
from test_bench_arrivals import write_tokenizer

from flexpipe_serve.bench.prompts import PromptBuilder

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

from peers.compare import Contender, Plan, compare
from peers.environment import Environment, PeerError
from peers.process import ServerProcess
from peers.recipes import PEERS, Launch, Load
from peers.table import print_tables, to_json

# Answers every completion with the prompt's first word as often as asked; a child process stands for a worker.
SERVER = """
import json, subprocess, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer(json.dumps({"data": [{"id": "tiny"}]}))

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert body["model"] == "tiny" and "ignore_eos" not in body
        events = [{"choices": [{"text": body["prompt"].split()[0]}]}] * body["max_tokens"]
        events.append({"choices": [{"text": "", "finish_reason": "length"}]})
        self.answer("".join(f"data: {json.dumps(event)}\\n\\n" for event in events) + "data: [DONE]\\n\\n")

    def answer(self, text):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_):
        pass

worker = subprocess.Popen(["sleep", "600"])
print("worker", worker.pid, flush=True)
ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def fake_server(port: int) -> Launch:
    return Launch([sys.executable, "-c", SERVER, str(port)])


def contender(name: str, **options: object) -> Contender:
    return Contender(name, options.pop("launch", fake_server), extra_body={"ignore_eos": None}, **options)  # type: ignore[arg-type]


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return Plan(streams=(1, 3), rounds=2, num_prompt_tokens=20, num_output_tokens=5, seed=0, logs=tmp_path / "logs")


@pytest.fixture
def prompts(tmp_path: Path) -> PromptBuilder:
    write_tokenizer(tmp_path, num_special=0)
    return PromptBuilder(tmp_path)


@pytest.fixture
def console(tmp_path: Path):
    with (tmp_path / "console.txt").open("w") as file:
        yield Console(file=file, width=200)


def workers(plan: Plan, name: str) -> list[int]:
    """Worker processes of a server that are still there, from what it logged."""
    pids = re.findall(r"^worker (\d+)$", (plan.logs / f"{name}.log").read_text(), re.MULTILINE)
    assert pids
    return [int(pid) for pid in pids if psutil.pid_exists(int(pid))]


def test_servers_take_turns_and_leave_nothing(plan: Plan, prompts: PromptBuilder, console: Console) -> None:
    paused, restarted = contender("paused"), contender("restarted", can_pause=False)
    compare([paused, restarted], plan, prompts, console)
    assert (paused.failure, restarted.failure) == (None, None)
    assert (len(paused.starts_s), len(restarted.starts_s)) == (1, 2)
    for each in (paused, restarted):
        assert each.process is None
        assert workers(plan, each.name) == []
        assert {streams: len(turns) for streams, turns in each.turns.items()} == {1: 2, 3: 2}
        assert [turn.summary.num_output_tokens for turn in each.turns[3]] == [15, 15]
        assert all(turn.other_cores is not None for turn in each.turns[3])
        assert each.peak_resident_bytes > 0
    # Both echo their prompts, so equal answers show that they got the same ones, and new ones each round.
    assert [turn.texts for turn in paused.turns[3]] == [turn.texts for turn in restarted.turns[3]]
    assert paused.turns[3][0].texts != paused.turns[3][1].texts


def test_a_peer_that_fails_is_reported_and_the_others_go_on(
    plan: Plan, prompts: PromptBuilder, console: Console, tmp_path: Path
) -> None:
    good = contender("good")
    dying = contender("dying", launch=lambda _port: Launch([sys.executable, "-c", "raise SystemExit('no such model')"]))
    away = Contender("away", None, url="http://127.0.0.1:9", model="m")
    compare([dying, good, away], plan, prompts, console)
    assert dying.failure is not None
    assert "status 1" in dying.failure
    assert "no such model" in dying.failure
    assert away.failure is not None
    assert "cannot connect" in away.failure
    assert (dying.turns, away.turns) == ({}, {})
    assert len(good.turns[1]) == 2
    print_tables([dying, good, away], console)
    console.file.flush()
    text = (tmp_path / "console.txt").read_text()
    assert "dying failed: ended with status 1" in text
    assert "away failed: " in text
    data = json.loads(json.dumps(to_json([dying, good, away], {})))
    assert data["servers"]["dying"]["failure"] == dying.failure
    assert data["servers"]["good"]["streams"]["1"][0]["same_answers"] == 0


def test_tables_compare_with_the_first(plan: Plan, prompts: PromptBuilder, console: Console, tmp_path: Path) -> None:
    contenders = [contender("a"), contender("b")]
    compare(contenders, plan, prompts, console)
    print_tables(contenders, console)
    console.file.flush()
    assert "6 of 6" in (tmp_path / "console.txt").read_text()  # answers as a's: 3 streams, 2 rounds
    assert [each["same_answers"] for each in to_json(contenders, {})["servers"]["b"]["streams"]["3"]] == [3, 3]


def test_an_interrupt_ends_every_server(plan: Plan, prompts: PromptBuilder, console: Console) -> None:
    first = contender("first")

    def interrupted(_port: int) -> Launch:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare([first, contender("second", launch=interrupted)], plan, prompts, console)
    assert first.process is None
    assert workers(plan, "first") == []


def wait_for(condition: Callable[[], object]) -> None:
    """A signal takes effect when the kernel next runs the process."""
    deadline_s = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def test_a_paused_tree_stands_still_and_a_stopped_one_is_gone(tmp_path: Path) -> None:
    # Ignores the interrupt, so that only the kill ends it.
    code = (
        "import signal, subprocess, sys; signal.signal(signal.SIGINT, signal.SIG_IGN);"
        "child = subprocess.Popen(['sleep', '600']); print(child.pid, flush=True); signal.pause()"
    )
    process = ServerProcess([sys.executable, "-c", code], env={}, log=tmp_path / "log", stop_s=0.2)
    root = process._root
    wait_for(lambda: (tmp_path / "log").read_text().strip())
    tree = [root, psutil.Process(int((tmp_path / "log").read_text()))]
    process.pause()
    wait_for(lambda: {each.status() for each in tree} == {psutil.STATUS_STOPPED})
    process.resume()
    wait_for(lambda: psutil.STATUS_STOPPED not in {each.status() for each in tree})
    process.pause()
    process.stop()
    assert not any(each.is_running() for each in tree)


@pytest.mark.slow
def test_environments_are_made_once_for_a_recipe(tmp_path: Path, console: Console) -> None:
    finished: list[Path] = []
    with pytest.raises(PeerError, match=r"install.*env-install\.log"):
        Environment("env", (("install", "--no-index", "no-such-thing"),), (), finished.append).ensure(tmp_path, console)
    assert finished == []
    # What failed half way, or was made by another recipe, is made anew.
    recipe = Environment("env", (("--version",),), ("pip",), finished.append)
    folder = recipe.ensure(tmp_path, console)
    assert recipe.ensure(tmp_path, console) == folder
    assert finished == [folder]
    assert list(recipe.versions(folder)) == ["pip"]


def test_recipes_start_on_the_port_with_room_for_the_load(tmp_path: Path) -> None:
    for peer in PEERS:
        launch = peer.launch(tmp_path, tmp_path / "model", 4321, Load(16, 300))
        assert "4321" in launch.command
    commands = {peer.name: peer.launch(tmp_path, tmp_path, 1, Load(16, 300)).command for peer in PEERS}
    assert commands["llamacpp"][4:6] == ["16", "364"]
    assert commands["transformers"][commands["transformers"].index("--cb-num-blocks") + 1] == "48"
