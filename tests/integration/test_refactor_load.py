"""Refactorings back to back under load: no request is lost, no bit differs, nothing is left behind.

Batches differ from run to run here; the native kernels compute every row by itself, so that the bits do not.
"""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import pytest
from engines import LinearHost, generate_all, running_engine
from leaks import check_idle, shared_files
from loads import Request, Transcript, load, make_requests, serve_all
from refactor_faults import refactor

from flexpipe_serve.engine.sampling_params import SamplingParams
from flexpipe_serve.kernels.native import native_library
from flexpipe_serve.pipeline import stage as stage_module
from flexpipe_serve.refactor.record import Mode, Outcome, RefactorRequest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(native_library() is None, reason="needs kernels that compute every row by itself"),
]
NUM_LAYERS = 6
NUM_REFACTORINGS = int(os.environ.get("FLEXPIPE_NUM_REFACTORINGS", "50"))
"""With each kind of domain; more for a soak: FLEXPIPE_NUM_REFACTORINGS=100."""
NUM_REQUESTS = 32


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    return make_requests(random.Random(11), NUM_REQUESTS)


@pytest.fixture(scope="module")
def expected(six_layers: Path, requests: list[Request]) -> dict[str, Transcript]:
    with running_engine(six_layers, host=LinearHost("native"), block_size=4) as engine:
        return serve_all(engine, requests)


def test_bits_do_not_depend_on_the_batch(
    six_layers: Path, requests: list[Request], expected: dict[str, Transcript]
) -> None:
    """What the other tests build on."""
    with running_engine(six_layers, host=LinearHost("native"), num_stages=3, block_size=4, max_tokens=2000) as engine:
        for request in requests[:8]:
            assert serve_all(engine, [request])[request.id] == expected[request.id]


def random_boundaries(rng: random.Random) -> tuple[int, ...]:
    return tuple(sorted(rng.sample(range(1, NUM_LAYERS), rng.randrange(NUM_LAYERS))))


@pytest.mark.parametrize("private_kv", [False, True], ids=["shared", "private"])
def test_many_refactorings_under_load(
    private_kv: bool, six_layers: Path, requests: list[Request], expected: dict[str, Transcript]
) -> None:
    rng = random.Random(private_kv)
    host = LinearHost("native")
    modes = [Mode.LIVE] * 6 + [Mode.WEIGHTS_ONLY, Mode.SYNC, Mode.RESTART]
    with running_engine(
        six_layers,
        host=host,
        num_stages=2,
        private_kv=private_kv,
        block_size=4,
        max_num_batched_tokens=64,
        max_tokens=1200,
    ) as engine:
        generate_all(engine, [[5]], SamplingParams(max_tokens=1))
        num_files = len(shared_files(engine))
        num_done = num_tokens = num_patched = 0
        longest = 0.0
        started = time.monotonic()
        with load(engine, requests, expected, num_clients=5) as running:
            while num_done < NUM_REFACTORINGS:
                boundaries = random_boundaries(rng)
                if engine.layout is not None and boundaries == engine.layout.boundaries:
                    continue
                record = refactor(
                    engine, RefactorRequest(boundaries=boundaries, mode=rng.choice(modes), max_bytes_per_s=5e6)
                )
                assert (record.outcome, record.error) == (Outcome.DONE, None)
                num_done += 1
                num_tokens += record.num_tokens_meanwhile
                num_patched += record.patch_bytes > 0
                if record.mode is Mode.LIVE:
                    longest = max(longest, record.longest_hold_seconds)
        seconds = time.monotonic() - started
        check_idle(engine, host)
        assert (num_patched > 0) == private_kv
        if engine.layout is not None and engine.layout.num_stages != 2:
            assert refactor(engine, RefactorRequest(stages=2)).outcome is Outcome.DONE
        check_idle(engine, host)
        assert len(shared_files(engine)) == num_files
        print(
            f"\n{num_done} refactorings in {seconds:.1f} s, {num_patched} with patches; {running.num_served} requests"
            f" served and {running.num_left} given up by their clients; {num_tokens} tokens during refactorings;"
            f" longest hold of a live one {longest * 1e3:.1f} ms"
        )


def test_kv_shrinks_for_a_refactoring_and_grows_back(
    six_layers: Path, requests: list[Request], expected: dict[str, Transcript], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A budget that has no room for both layouts' weights and KV: the plan shrinks the KV, by copies in the steps."""
    monkeypatch.setattr(stage_module, "private_bytes", lambda device: 0)  # this process is not the stage's alone
    host = LinearHost("native")
    with running_engine(
        six_layers,
        host=host,
        boundaries=(2, 4),
        private_kv=True,
        block_size=4,
        max_num_batched_tokens=64,
        max_tokens=4000,
    ) as engine:
        reports = engine._pipeline.reports()
        num_blocks = engine.status().kv.num_blocks
        block_bytes = engine._pipeline.budget.block_bytes
        for report in reports.values():
            # Room for all blocks of three layers, or two thirds of them while it holds four.
            held = report.weights_bytes + report.overhead_bytes
            engine._pipeline.budgets[report.domain] = held + 3 * (num_blocks + 30) * block_bytes + (300 << 10)
        rng = random.Random(3)
        shrunk = 0
        with load(engine, requests, expected, num_clients=6):
            for _ in range(12):
                boundaries = rng.choice([(2, 4), (1, 4), (3, 5), (1, 3), (3, 4)])
                if engine.layout is not None and boundaries == engine.layout.boundaries:
                    continue
                record = refactor(engine, RefactorRequest(boundaries=boundaries))
                assert (record.outcome, record.error) == (Outcome.DONE, None)
                shrunk += record.plan.num_blocks_during < record.plan.num_blocks_before
                print(
                    record.plan.verdict, record.plan.num_blocks_before, record.plan.num_blocks_during, record.num_blocks
                )
        check_idle(engine, host)
        assert shrunk
