"""Steps of one epoch run in order, with all of their inputs, when their patches are there."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from flexpipe_serve.pipeline.step_queue import StepQueue

Event = tuple[str, int]


@st.composite
def histories(draw: st.DrawFn) -> tuple[bool, list[int], list[Event]]:
    """Whether inputs are needed, what each step waits for, and messages: each kind in order, the kinds interleaved."""
    needs_input = draw(st.booleans())
    num_steps = draw(st.integers(1, 8))
    gates = draw(st.lists(st.integers(0, 5), min_size=num_steps, max_size=num_steps))
    streams: list[list[Event]] = [[("step", n) for n in range(num_steps)], [("patch", n) for n in range(1, 6)]]
    if needs_input:
        streams.append([("input", n) for n in range(num_steps)])
    events = []
    while any(streams):
        stream = draw(st.sampled_from([s for s in streams if s]))
        events.append(stream.pop(0))
    return needs_input, gates, events


@given(histories())
def test_every_step_runs_once_in_order_as_soon_as_it_may(history: tuple[bool, list[int], list[Event]]) -> None:
    needs_input, gates, events = history
    queue: StepQueue[str, str] = StepQueue(needs_input=needs_input)
    ran: list[int] = []
    applied = 0
    complete_at: dict[int, float] = {}
    seen: set[Event] = set()
    for now, (kind, number) in enumerate(events, start=1):
        seen.add((kind, number))
        if kind == "step":
            queue.add_step(number, f"step {number}", patched_through=gates[number], now=now)
        elif kind == "input":
            queue.add_input(number, f"input {number}", now=now)
        else:
            applied = number
        if kind != "patch" and {("step", number), ("input", number) if needs_input else ("step", number)} <= seen:
            complete_at[number] = now
        while ready := queue.pop(applied.__ge__, now=now):
            assert ready.number == len(ran), "in order"
            assert gates[ready.number] <= applied
            assert (ready.step, ready.given) == (
                f"step {ready.number}", f"input {ready.number}" if needs_input else None
            )  # fmt: skip
            assert ready.held_seconds == now - complete_at[ready.number], "nothing but patches holds a complete step"
            ran.append(ready.number)
        if len(ran) < len(gates) and len(ran) in complete_at:
            assert gates[len(ran)] > applied, "it could run"
    assert len(ran) == len(gates)


def test_a_step_whose_input_was_lost_holds_nobody_up() -> None:
    queue: StepQueue[str, str] = StepQueue(needs_input=True)
    for number in (1, 2):
        queue.add_step(number, "step", patched_through=0, now=0.0)
    queue.add_input(2, "input", now=1.0)
    ready = queue.pop(lambda step: True, now=2.0)
    assert ready is not None
    assert (ready.number, ready.held_seconds) == (2, 0.0)
    assert queue.pop(lambda step: True, now=2.0) is None
