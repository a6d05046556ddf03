"""Refactorings measured from end to end, on a small server that only says it refactors, and the report made of it."""

import argparse
import asyncio
import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from status_samples import pipeline_status, server_status, stage
from test_bench_arrivals import write_tokenizer
from test_bench_serve import FakeServer
from test_bench_windows import record

from flexpipe_serve.bench import experiment, refactor
from flexpipe_serve.bench.leaks import Holdings, find_leaks
from flexpipe_serve.bench.load import StreamRecord
from flexpipe_serve.bench.refactor_report import summary_rows
from flexpipe_serve.bench.refactor_run import Section, Session
from flexpipe_serve.bench.tour import Step
from flexpipe_serve.bench.trial import Trial
from flexpipe_serve.bench.windows import Window
from flexpipe_serve.refactor.record import Outcome

TEXT = "abcdefghijklmnop"


class FakePipeline(FakeServer):
    """Streams the alphabet, and remembers which layout it was told."""

    def __init__(self) -> None:
        super().__init__()
        self.boundaries = [15]
        self.asked: list[tuple[list[int], str]] = []
        self.refuse: list[int] | None = None
        self.wrong_text = False
        self.cut = False
        self.was_refactored = False
        self.record = record()
        self.num_looks = [0]
        """At the server, before the first refactoring and since each."""

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            method, path, _ = head.split(" ", 2)
            length = [int(line[15:]) for line in head.lower().splitlines() if line.startswith("content-length:")]
            body = json.loads(await reader.readexactly(length[0])) if length and length[0] else {}
            if path == "/v1/completions" and body.get("stream"):
                await self.complete(body, writer)
                return
            status, answer = self.answer(method, path, body)
            data = msgspec.json.encode(answer)
            writer.write(b"HTTP/1.1 %d x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % (status, len(data)))
            writer.write(data)
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the client ended the stream
        finally:
            writer.close()

    def answer(self, method: str, path: str, body: dict) -> tuple[int, object]:
        if path == "/v1/models":
            return 200, {"data": [{"id": "tiny"}]}
        if path == "/v1/completions":
            tops = [{TEXT[i]: -0.1, "X": -0.1 - 1e-5} for i in range(len(TEXT))]
            return 200, {"choices": [{"logprobs": {"text_offset": list(range(len(TEXT))), "top_logprobs": tops}}]}
        if path == "/flexpipe/status":
            stages = [stage(f"stage-{i}", pid=2**22 + 1) for i in range(len(self.boundaries) + 1)]
            return 200, server_status(pipeline_status(self.boundaries, stages=stages, kv={"num_blocks": 9}))
        if method == "POST":
            assert path == "/flexpipe/refactor"
            if body["boundaries"] == self.refuse:
                outcome = record(outcome=Outcome.REFUSED, error="no room", requested_at=time.time(), seconds=0.0)
                error = {"error": {"message": "no room", "param": None, "code": "refactor_refused"}}
                return (200, outcome) if body["dry_run"] else (409, error)
            self.asked.append((body["boundaries"], body["mode"]))
            self.boundaries = body["boundaries"]
            self.was_refactored = True
            self.num_looks.append(0)
            self.record = record(requested_at=time.time(), switched_at=time.time() + 0.02, seconds=0.05)
            return 202, msgspec.structs.replace(self.record, outcome=Outcome.RUNNING)
        self.num_looks[-1] += 1
        if path == "/flexpipe/refactor":
            return 200, {"data": []}
        assert path == "/flexpipe/refactor/r"
        return 200, self.record

    async def complete(self, body: dict, writer: asyncio.StreamWriter) -> None:
        is_disturbed, self.was_refactored = self.was_refactored, False  # the first stream after a refactoring is
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        usage = {"prompt_tokens": 8, "completion_tokens": body["max_tokens"]}
        messages: list[dict | str] = [{"choices": [{"text": letter}]} for letter in TEXT[: body["max_tokens"]]]
        if self.wrong_text and is_disturbed:
            messages[0] = {"choices": [{"text": "X"}]}
        messages += [{"choices": [{"text": "", "finish_reason": "length"}]}, {"choices": [], "usage": usage}, "[DONE]"]
        if self.cut and is_disturbed:
            del messages[1:]
        for message in messages:
            data = f"data: {message if isinstance(message, str) else json.dumps(message)}\n\n".encode()
            writer.write(b"%x\r\n%s\r\n" % (len(data), data))
            await writer.drain()
            await asyncio.sleep(0.003)
        if not (self.cut and is_disturbed):
            writer.write(b"0\r\n\r\n")


@pytest.fixture
def fake() -> Iterator[FakePipeline]:
    return FakePipeline()


@pytest.fixture
def bench(tmp_path: Path, fake: FakePipeline, monkeypatch: pytest.MonkeyPatch):
    write_tokenizer(tmp_path, num_special=0)
    monkeypatch.setattr("flexpipe_serve.bench.refactor_run._SETTLE_S", 0.05)

    def run(*options: str) -> tuple[int, dict]:
        parser = argparse.ArgumentParser()
        refactor.add_arguments(parser)
        parser.set_defaults(run=refactor.main)
        out = tmp_path / "out.json"

        async def serve_and_run() -> int:
            listener = await asyncio.start_server(fake.handle, "127.0.0.1", 0)
            url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
            args = parser.parse_args(
                ["--tokenizer", str(tmp_path), "--json", str(out), "--url", url, "--idle", "0.15", "--concurrency", "2",
                 "--prompt-tokens", "8", "--output-tokens", "16", *options]
            )  # fmt: skip
            async with listener:
                return await asyncio.to_thread(refactor.main, args)

        with contextlib.suppress(FileNotFoundError):
            out.unlink()
        # Signals can be handled in the main thread only.
        monkeypatch.setattr(experiment, "interruptible", contextlib.nullcontext)
        return asyncio.run(serve_and_run()), json.loads(out.read_text())

    return run


def test_a_tour_in_two_modes(fake: FakePipeline, bench, tmp_path: Path) -> None:
    plot = tmp_path / "p.png"
    code, data = bench("--modes", "live,sync", "--plot", str(plot))
    assert code == 0
    layouts = [[19], [10, 20], [5, 25], [15], [], [15]]
    assert fake.asked == [(layout, "live") for layout in layouts] + [(layout, "sync") for layout in layouts]
    assert [section["name"] for section in data["sections"]] == ["live", "sync"]
    for section in data["sections"]:
        assert (section["num_dropped"], section["num_stalled"], section["differences"]) == (0, 0, [])
        assert sum(not stream["was_ended"] for stream in section["streams"]) > 0
        for trial in section["trials"]:
            before, window, after = trial["before"], trial["window"], trial["after"]
            assert before["end_s"] < window["start_s"] < window["end_s"] < after["start_s"] < after["end_s"]
            assert window["end_s"] - window["start_s"] == pytest.approx(0.05)
            assert trial["switched_s"] - window["start_s"] == pytest.approx(0.02, abs=0.005)
            assert trial["figures"]["gaps_ms"]["count"] > 0
    assert [(row["mode"], row["kind"]) for row in data["summary"]][5:8] == [
        ("live", "scale-out"), ("live", "all"), ("sync", "shift"),
    ]  # fmt: skip
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_the_server_is_looked_at_at_rest_too(fake: FakePipeline, bench) -> None:
    """Looks take a percent or two of a small machine's tokens."""
    bench("--modes", "live", "--kinds", "shift,split")
    at_first, *others = fake.num_looks
    assert at_first >= 1
    assert min(others) >= 2, "one of them tells that the refactoring is over"


def test_kinds_that_do_not_follow_each_other_are_joined(fake: FakePipeline, bench) -> None:
    code, data = bench("--modes", "sync", "--kinds", "shift,merge", "--rounds", "2", "--pure-decode")
    assert code == 0
    measured = [([19], "sync"), ([5, 25], "live"), ([15], "sync")]
    assert fake.asked == measured * 2
    assert [trial["step"]["kind"] for section in data["sections"] for trial in section["trials"]] == [
        "shift", "merge", "shift", "merge",
    ]  # fmt: skip


def test_a_refused_refactoring_is_reported_and_the_others_go_on(fake: FakePipeline, bench) -> None:
    fake.refuse = [10, 20]
    code, data = bench("--modes", "live")
    outcomes = [trial["record"]["outcome"] for trial in data["sections"][0]["trials"]]
    assert code == 1
    assert outcomes == ["done", "refused", "done", "done", "done", "done"]


def test_other_text_at_a_tie_is_counted_but_no_failure(fake: FakePipeline, bench) -> None:
    fake.wrong_text = True
    code, data = bench("--modes", "live", "--kinds", "shift")
    found = data["sections"][0]["differences"]
    assert [(d["char"], d["piece"], d["num_pieces"], d["found"][0]) for d in found] == [(0, 0, 1, "X")]
    assert found[0]["logprob_gap"] == pytest.approx(1e-5)
    assert code == 0


def test_lost_streams_are_dropped(fake: FakePipeline, bench) -> None:
    fake.cut = True
    code, data = bench("--modes", "live", "--kinds", "shift")
    section = data["sections"][0]
    assert code == 1
    assert section["num_dropped"] == 1
    assert {s["error"] for s in section["streams"]} == {None, "the stream broke off after 1 pieces of text"}


def test_churn(fake: FakePipeline, bench) -> None:
    code, data = bench("--churn", "5", "--max-stages", "3", "--seed", "1")
    assert code == 0
    assert len(fake.asked) == 5
    assert fake.asked[-1] == ([15], "live")
    assert len(data["sections"][0]["trials"]) == 5
    assert data["holdings"]["url"]["num_stages"] == [2, 2]


def test_an_interrupted_churn_keeps_what_it_has(fake: FakePipeline, bench, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Session.refactor

    async def refactor_twice(session: Session, *args: object, **kwargs: object) -> object:
        if len(fake.asked) == 2:
            raise KeyboardInterrupt
        return await real(session, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(Session, "refactor", refactor_twice)
    code, data = bench("--churn", "5", "--seed", "1")
    assert code == 1
    (section,) = data["sections"]
    assert len(section["trials"]) == 2
    assert len(section["streams"]) >= 2
    assert data["holdings"]["url"]["num_stages"] == [2, len(fake.boundaries) + 1]


def test_modes_that_stop_are_measured_once_beside_live(fake: FakePipeline, bench) -> None:
    code, data = bench("--modes", "live,sync", "--kinds", "shift", "--rounds", "2")
    assert code == 0
    assert [(section["name"], section["round"]) for section in data["sections"]] == [
        ("live", 0), ("sync", 0), ("live", 1),
    ]  # fmt: skip


def test_rows_of_several_rounds() -> None:
    """One stop of 1 s in one of two rounds: the range shows it, and so do the pooled gaps."""
    times = [i / 10 for i in range(400) if not 220 < i < 230]
    stream = StreamRecord(0, 0, 400, 0.0, 40.0, tuple(times), ("x",) * len(times))

    def trial(start_s: float, round_index: int, stop_seconds: float) -> Trial:
        window = Window(start_s, start_s + 2)
        found = record(stop_seconds=stop_seconds, snapshot_bytes=3_000_000, patch_bytes=500_000)
        before, after = Window(start_s - 8, start_s - 1), Window(start_s + 3, start_s + 9)
        return Trial("private", "live", round_index, Step("shift", (1,), (2,)), found, window, start_s, before, after)

    sections = [
        Section("private", "live", 0, [trial(9.0, 0, 0.001)], [stream]),
        Section("private", "live", 1, [trial(21.5, 1, 1.0)], []),
    ]
    samples = {"private": [(i / 5, 100_000_000 * (2 if 45 < i < 50 else 1)) for i in range(200)]}
    shift, every = summary_rows(sections, samples)
    assert (shift.kind, every.kind) == ("shift", "all")
    assert shift.stop_ms is not None
    assert (shift.stop_ms.low, shift.stop_ms.high) == (1, 1000)
    assert shift.pooled.gaps_ms.max == pytest.approx(1000)
    assert shift.p99_ratio is not None
    assert shift.p99_ratio.low == pytest.approx(1)
    assert shift.p99_ratio.high > 5
    assert shift.copied_mb is not None
    assert shift.copied_mb.median == pytest.approx(3.5)
    assert shift.extra_mb is not None
    assert (shift.extra_mb.low, shift.extra_mb.high) == (0, 100)
    assert shift.pooled == every.pooled


def test_leaks() -> None:
    before = Holdings(2, 1, 0, 0, 0, 100, 3, 30, 10**9)
    assert find_leaks(before, before) == []
    after = Holdings(2, 1, 0, 0, 5, 101, 4, 29, 2 * 10**9)
    assert find_leaks(before, after) == ["num_used_blocks", "num_stage_processes"]
    assert find_leaks(before, Holdings(2, 1, 0, 0, 0, 100, None, None, None)) == []
