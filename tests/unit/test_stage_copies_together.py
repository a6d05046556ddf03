"""When a stage that gives to several targets sends the patches of its steps."""

from __future__ import annotations

from typing import Any

from flexpipe_serve.pipeline.stage_copies import _STEPS_AT_ONCE, StageCopies, _Giving


class FakeGiver:
    """A snapshot of one message; a patch is the numbers of its steps."""

    old_epoch = 1
    is_last_chunk = True

    def __init__(self, *, is_complete: bool) -> None:
        self.is_complete = is_complete

    def ready_at(self, now: float) -> float | None:
        return None if self.is_complete else now

    def next_chunk(self, now: float) -> list[bytes]:
        self.is_complete = True
        return [b"snapshot"]

    def on_steps(self, steps: list[tuple[int, None]]) -> list[int]:
        return [step for step, _ in steps]


class FakeOutlet:
    def __init__(self) -> None:
        self.sent: list[list[Any]] = []

    def send(self, frames: list[Any]) -> None:
        self.sent.append(frames)


def test_patches_go_together_until_the_last_snapshot_is_sent_and_then_at_once() -> None:
    """Where one copy was complete and another on its way, each step cost a message although nobody waited for it."""
    copies = StageCopies(stage="stage-0", kv=None, connect=lambda endpoint: None)  # type: ignore[arg-type, return-value]
    done, late = FakeOutlet(), FakeOutlet()
    copies._giving = {
        (2, "stage-1"): _Giving(FakeGiver(is_complete=True), done),  # type: ignore[arg-type]
        (2, "stage-2"): _Giving(FakeGiver(is_complete=False), late),  # type: ignore[arg-type]
    }
    for step in range(_STEPS_AT_ONCE + 2):
        copies.on_step(1, step, None, now=0.0)
    together = [*range(_STEPS_AT_ONCE)]
    assert done.sent == late.sent == [together]
    assert copies.send_chunk(0.0)
    rest = [_STEPS_AT_ONCE, _STEPS_AT_ONCE + 1]
    assert done.sent == [together, rest]
    assert late.sent == [together, rest, [b"snapshot"]]
    copies.on_step(1, _STEPS_AT_ONCE + 2, None, now=0.0)
    assert done.sent[2:] == late.sent[3:] == [[_STEPS_AT_ONCE + 2]]
