"""The same batches with and without refactorings: every bit that comes out must be the same.

The kernels here are torch's own, whose bits depend on what else is computed with a token. So these tests compare runs
whose steps are equal (and check that they are): a difference is the refactoring's. That tokens do not change where
batches do differ is for ``test_refactor_load.py``, with kernels that compute every row by itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
from leaks import check_pipeline, settle
from lockstep import Change, Script, Transcript, make_changes, make_script, run_script

from flexpipe_serve.engine.engine import Engine
from flexpipe_serve.kv import transfer_plan
from flexpipe_serve.refactor.record import Mode, Outcome, RefactorRequest

NUM_TICKS = 100
NUM_REQUESTS = 28
KV_TOKENS = 320
"""Fewer than the running sequences come to need: some are preempted."""

KINDS: dict[str, list[tuple[int, ...]]] = {
    "shift": [(2, 4), (1, 4), (3, 4), (3, 5), (1, 2), (2, 4)],
    "split": [(3,), (2, 3), (1, 2, 3, 5), (1, 2, 3, 4, 5)],
    "merge": [(1, 2, 3, 4, 5), (1, 2, 4), (2, 4), (4,), ()],
    "both directions": [(2, 4), (1, 5), (3, 4), (1, 5), (2, 3)],
    "one, three, one": [(), (2, 4), (), (1, 3), ()],
}
Runner = Callable[..., Transcript]


def check(engine: Engine) -> None:
    settle(engine)
    loop = engine._loop
    loop.call(loop.scheduler.check_integrity).result()
    stats = loop.scheduler.stats()
    assert stats.num_used_blocks == 0
    assert stats.num_free_blocks + stats.num_cached_blocks == stats.num_blocks
    check_pipeline(engine)


@pytest.fixture(scope="module")
def run(six_layers: Path) -> Runner:
    return functools.partial(run_script, six_layers, max_tokens=KV_TOKENS, check=check)


@functools.cache
def script_of(seed: int) -> Script:
    return make_script(seed, num_requests=NUM_REQUESTS, num_ticks=NUM_TICKS)


@pytest.fixture(scope="module")
def undisturbed(run: Runner) -> Callable[[int, int], Transcript]:
    """The run without refactorings of a seed at a depth."""

    @functools.cache
    def run_once(seed: int, depth: int) -> Transcript:
        return run(script_of(seed), boundaries=(3,), depth=depth)

    return run_once


def assert_identical(changed: Transcript, undisturbed: Transcript) -> None:
    assert changed.steps == undisturbed.steps  # the premise
    assert changed.results == undisturbed.results


@pytest.mark.parametrize("private_kv", [False, True], ids=["shared", "private"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_live_refactoring_changes_no_bit(
    kind: str,
    private_kv: bool,
    run: Runner,
    undisturbed: Callable[[int, int], Transcript],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(transfer_plan, "MAX_CHUNK_BYTES", 4000)  # so that the little there is takes its time
    seed, depth = int(private_kv), 2 + private_kv
    first, *others = KINDS[kind]
    expected = undisturbed(seed, depth)
    assert expected.num_preemptions > 0
    requests = [RefactorRequest(boundaries=boundaries, max_bytes_per_s=1.25e6) for boundaries in others]
    changes = make_changes(list(KINDS).index(kind), requests, num_ticks=NUM_TICKS)
    changed = run(script_of(seed).during(changes), boundaries=first, depth=depth, private_kv=private_kv)
    assert [(r.outcome, r.error) for r in changed.records] == [(Outcome.DONE, None)] * len(others)
    assert sum(changed.num_kept) > len(others), "hardly a sequence was on its way"
    assert (sum(r.patch_bytes for r in changed.records) > 0) == private_kv
    assert_identical(changed, expected)


@pytest.mark.parametrize("private_kv", [False, True], ids=["shared", "private"])
@pytest.mark.parametrize("mode", [Mode.WEIGHTS_ONLY, Mode.SYNC])
def test_a_refactoring_that_pauses_changes_no_bit(
    mode: Mode, private_kv: bool, run: Runner, undisturbed: Callable[[int, int], Transcript]
) -> None:
    """With one step in flight a pause does not change the batches either."""
    layouts = [(1, 5), (3,), (), (2, 3, 4)]
    requests = [RefactorRequest(boundaries=boundaries, mode=mode) for boundaries in layouts]
    changes = make_changes(7, requests, num_ticks=NUM_TICKS)
    changed = run(script_of(7).during(changes), boundaries=(2, 4), depth=1, private_kv=private_kv)
    assert [(r.outcome, r.error) for r in changed.records] == [(Outcome.DONE, None)] * len(layouts)
    assert_identical(changed, undisturbed(7, 1))


def test_the_comparison_finds_a_lost_patch(
    run: Runner, undisturbed: Callable[[int, int], Transcript], monkeypatch: pytest.MonkeyPatch
) -> None:
    """KV written while it is copied must go along: without it these tests fail."""
    from flexpipe_serve.kv.transfer import KVGiver

    real = KVGiver.on_steps
    monkeypatch.setattr(KVGiver, "on_steps", lambda giver, steps: real(giver, [(step, None) for step, _ in steps]))
    change = Change(60, 60, RefactorRequest(boundaries=(1, 5), max_bytes_per_s=2.5e6))
    changed = run(script_of(1).during([change]), boundaries=(2, 4), depth=3, private_kv=True)
    assert changed.results != undisturbed(1, 3).results
