"""Draws histories from seeds, and makes one that fails as small as it goes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from random import Random

from refactor_sim import History, Op, run

from flexpipe_serve.refactor.record import Phase

PHASES = (Phase.PREPARE, Phase.COPY, Phase.SWITCH, Phase.RETIRE)
"""Those that are waited in."""
_SPAN = 150
"""Events over which things happen."""


def draw(seed: int) -> History:
    """The history of a seed."""
    rng = Random(seed)
    num_layers = rng.randint(2, 4)
    ops = [_add(rng, after=rng.choice([0, 0, rng.randrange(_SPAN)])) for _ in range(rng.randint(3, 8))]
    ops += [_refactor(rng, num_layers) for _ in range(rng.choice([1, 1, 1, 2, 3]))]
    is_hurried = rng.random() < 0.15
    if is_hurried:
        ops += _second_thoughts(rng)
    for _ in range(rng.choice([0, 1, 1, 2, 2, 3])):
        ops.append(_disturbance(rng))
    for _ in range(rng.choice([0, 0, 0, 1, 1, 2])):
        ops.append(_fault(rng))
    return History(
        seed=seed,
        num_layers=num_layers,
        boundaries=tuple(range(1, num_layers)) if is_hurried else _boundaries(rng, num_layers),
        domains=rng.choice(["shared", "private", "private", "nodes"]),
        num_blocks=rng.randint(10, 18),
        has_pool=rng.random() < 0.5,
        snapshot_bytes=rng.choice([16, 64, 1 << 20]),
        slow_lane="data" if is_hurried else rng.choice(["", "", "copy", "copy", "data", "control"]),
        ops=tuple(sorted(ops, key=lambda op: op.after)),
    )


def minimise(history: History, *, bugs: frozenset[str] = frozenset()) -> History:
    """A smaller history that fails too: every op that is left is needed."""

    def fails(candidate: History) -> bool:
        try:
            run(candidate, bugs=bugs)
        except Exception:
            return True
        return False

    return _smaller(history, fails)


def _smaller(history: History, fails: Callable[[History], bool]) -> History:
    before = None
    while before != history:
        before = history
        for op in history.ops:
            candidate = replace(history, ops=tuple(o for o in history.ops if o is not op))
            if fails(candidate):
                history = candidate
        for change in ({"has_pool": False}, {"snapshot_bytes": 1 << 20}, {"slow_lane": ""}):
            candidate = replace(history, **change)  # type: ignore[arg-type]
            if candidate != history and fails(candidate):
                history = candidate
    return history


def describe(history: History, *, bugs: frozenset[str] = frozenset()) -> str:
    """The history and what came of it."""
    lines = [
        f"seed {history.seed}: {history.num_layers} layers, boundaries {history.boundaries}, {history.domains} KV,"
        f" {history.num_blocks} blocks, pool {history.has_pool}, chunks of {history.snapshot_bytes} bytes, slow lane"
        f" {history.slow_lane!r}"
    ]
    lines += [f"  {op}" for op in history.ops]
    try:
        run(history, bugs=bugs)
    except Exception as error:
        for event, *what in error.world.trace:  # type: ignore[attr-defined]
            line = str(what[0]) if len(what) == 1 else f"{' -> '.join(what[0][:2])} ({what[0][2]}): {what[1]}"
            lines.append(f"  ... {event}: {line}"[:180])
        lines.append(f"{type(error).__name__}: {error}")
    return "\n".join(lines)


def _boundaries(rng: Random, num_layers: int) -> tuple[int, ...]:
    num = rng.randint(0, min(2, num_layers - 1))
    return tuple(sorted(rng.sample(range(1, num_layers), num)))


def _add(rng: Random, *, after: int) -> Op:
    text = rng.choice([(0, 1, 2, 3, 4, 0, 1), (0, 1, 2, 3, 1, 1, 2), (4, 3, 2, 1, 0, 1, 2)])
    return Op(after, None, "add", (text[: rng.randint(1, 7)], rng.randint(1, 13)))


def _refactor(rng: Random, num_layers: int) -> Op:
    mode = rng.choice(["live"] * 7 + ["sync", "weights_only", "restart"])
    shrink = rng.choice([0.0, rng.random(), 1.0])
    args = (_boundaries(rng, num_layers), mode, shrink, rng.randint(0, 4))
    return Op(rng.randrange(_SPAN), None, "refactor", args)


def _second_thoughts(rng: Random) -> list[Op]:
    """A refactoring that is cancelled while blocks move down, and another one at once."""
    start = rng.randrange(20, 100)
    return [
        *(Op(0, None, "add", ((token,) * rng.randint(1, 7), rng.randint(4, 13))) for token in range(5)),
        Op(start, None, "refactor", ((), "live", 1.0, 0)),
        Op(rng.randrange(8), Phase.PREPARE, "cancel"),
        Op(start + 1, None, "refactor", ((), "live", 0.0, 2)),
    ]


def _when(rng: Random) -> tuple[int, Phase | None]:
    if rng.random() < 0.3:
        return rng.randrange(_SPAN), None
    return rng.choice([0, rng.randrange(6), rng.randrange(40)]), rng.choice(PHASES)


def _disturbance(rng: Random) -> Op:
    """What happens to a healthy service."""
    after, phase = _when(rng)
    kind = rng.choice(["add", "abort", "abort", "slow_down", "slow_down", "limit_copies", "repeat", "repeat_event"])
    if kind == "add":
        return replace(_add(rng, after=after), phase=phase)
    args = {
        "abort": (rng.randrange(8),),
        "slow_down": (rng.choice(["data", "copy", "control", "answer", "wait"]), rng.randrange(5, 60)),
        "limit_copies": (rng.choice([0.5, 4.0]) * 16,),
        "repeat": (rng.choice(["patch", "ack"]),),
        "repeat_event": (rng.randrange(6),),
    }[kind]
    return Op(after, phase, kind, args)


def _fault(rng: Random) -> Op:
    after, phase = _when(rng)
    kind = rng.choice(["kill", "kill", "kill", "cancel", "time_out", "fail_step", "fail_growth", "lose", "call_fault"])
    args = {
        "kill": (rng.randrange(6),),
        "fail_step": (rng.randrange(6),),
        "fail_growth": (rng.randrange(6),),
        "lose": ("patch",),
        "call_fault": (rng.choice(["lose", "late"]),),
    }.get(kind, ())
    return Op(after, phase, kind, args)
