"""Thousands of histories of refactorings in a simulated world, and planted bugs that it must find.

Real are the protocol's machine, the scheduler with its block manager, both ends of a KV copy and the stages' queues of
steps; model are stages, channels, the engine loop around the scheduler and the I/O around the machine.

Checked in every history:

* every step reads, in every layer, exactly the KV of its own text, and goes through all layers in order, each once;
* no patch of an old step overwrites what a step of the new epoch wrote;
* when a refactoring ends, and in the end, stages hold exactly the layers, routes, segments and copies of the layout in
  force, warm stages nothing, segments have the capacity that the scheduler believes in, and it lost no block;
* an abort ends in the old layout with the old capacity, anything else in the new layout;
* every refactoring and every sequence ends, each with all its tokens.
"""

import os
import time
from collections import Counter
from dataclasses import replace

import pytest
from refactor_sim import run
from refactor_sim_histories import describe, draw, minimise

NUM_HISTORIES = int(os.environ.get("FLEXPIPE_NUM_HISTORIES", "1000"))
"""How many the suite runs; more for a soak: FLEXPIPE_NUM_HISTORIES=100000."""
FIRST_SEED = int(os.environ.get("FLEXPIPE_FIRST_SEED", "0"))

PLANTED_BUGS = (
    "no patch gate",
    "the gate is one step short",
    "the old epoch is not drained",
    "patches are not awaited",
    "patches count on arrival",
    "gaps are ignored",
    "nothing is mirrored",
    "mirroring begins behind the snapshot",
    "blocks are listed too early",
    "results are taken early",
    "capacity grows at the switch",
    "shrunk before the blocks have moved",
    "a shrink taken back is not awaited",
    "an abort forgets who gives",
    "late copies begin",
)
MAX_SEEDS = 600
"""In which each of them must be found."""


def first_failure(*, bugs=frozenset(), num):
    for seed in range(num):
        try:
            run(draw(seed), bugs=bugs)
        except Exception:
            return seed
    return None


@pytest.mark.slow
@pytest.mark.timeout(1200)  # about 45 s of one core that has nothing else to do
def test_all_invariants_hold_in_thousands_of_histories():
    started = time.process_time()
    num_events, outcomes, seen = 0, Counter(), Counter()
    for seed in range(FIRST_SEED, FIRST_SEED + NUM_HISTORIES):
        try:
            world = run(draw(seed))
        except Exception:
            pytest.fail(describe(minimise(draw(seed))), pytrace=False)
        num_events += world.num_events
        outcomes.update(world.outcomes)
        seen.update(world.seen)
    seconds = time.process_time() - started
    print(f"\n{NUM_HISTORIES} histories, {num_events} events, {seconds:.1f} s of one core")
    for (mode, outcome), num in sorted(outcomes.items()):
        print(f"  {num:6} refactorings: {mode}, {outcome}")
    for what, num in sorted(seen.items()):
        print(f"  {num:6} {what}")
    if NUM_HISTORIES >= 5000:
        check_it_gets_everywhere(outcomes, seen)


def check_it_gets_everywhere(outcomes, seen):
    for mode in ("live", "weights_only", "sync"):
        assert all(outcomes[mode, outcome] for outcome in ("done", "aborted", "recovered"))
    for phase in ("prepare", "copy", "switch", "retire"):
        for role in ("leaving source", "new target", "staying source", "staying target"):
            assert seen[f"{role} killed in {phase}"], f"{role} in {phase}"
    for what in (
        "steps held for a patch",
        "steps of the old route after the switch",
        "steps while copying",
        "steps with copies down",
        "failed steps",
        "aborted sequences",
        "late copies ignored",
    ):
        assert seen[what] > 20, what


@pytest.mark.parametrize("bug", PLANTED_BUGS)
def test_a_planted_bug_is_found(bug):
    bugs = frozenset([bug])
    seed = first_failure(bugs=bugs, num=MAX_SEEDS)
    assert seed is not None, f"not found in {MAX_SEEDS} histories"
    run(draw(seed))  # it is the bug that fails
    smallest = minimise(draw(seed), bugs=bugs)
    print(f"\n{bug}: found by the {seed + 1}. history\n{describe(smallest, bugs=bugs)}")
    assert len(smallest.ops) <= len(draw(seed).ops)
    with pytest.raises(Exception) as found:  # noqa: PT011 - whatever the bug breaks
        run(smallest, bugs=bugs)
    assert str(found.value) in describe(smallest, bugs=bugs)
    for op in smallest.ops:  # nothing could be left out
        run_without(smallest, op, bugs)


def run_without(history, op, bugs):
    """Passes."""
    run(replace(history, ops=tuple(other for other in history.ops if other is not op)), bugs=bugs)


def test_a_seed_is_a_history():
    for seed in range(30):
        first, second = run(draw(seed)), run(draw(seed))
        assert first.num_events == second.num_events
        assert first.outcomes == second.outcomes
        assert [what[:2] for what in first.trace] == [what[:2] for what in second.trace]
