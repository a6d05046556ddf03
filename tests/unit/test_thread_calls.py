"""Calls into a thread, which is this one here."""

from __future__ import annotations

import pytest

from flexpipe_serve.engine.thread_calls import ThreadCalls


@pytest.fixture
def calls() -> ThreadCalls:
    return ThreadCalls(lambda: None)


def test_each_gets_its_own_answer(calls: ThreadCalls) -> None:
    seven, failing = calls.call(lambda: 7), calls.call(lambda: 1 // 0)
    assert not calls.is_empty
    calls.run()
    assert calls.is_empty
    assert seven.result(0) == 7
    assert isinstance(failing.exception(0), ZeroDivisionError)


def test_one_that_was_cancelled_is_left_out_and_hinders_no_other(calls: ThreadCalls) -> None:
    """A client may leave while its request is on its way to the engine."""
    made: list[str] = []
    left, other = calls.call(lambda: made.append("left")), calls.call(lambda: made.append("other"))
    assert left.cancel()
    calls.run()
    assert made == ["other"]
    assert other.done()


def test_conditions_are_asked_until_they_are_true(calls: ThreadCalls) -> None:
    answers = [False, True]
    future = calls.when(lambda: answers.pop(0))
    calls.check()
    assert answers == [False, True], "it is the thread's from its next run on"
    calls.run()
    calls.check()
    assert not future.done()
    assert calls.num_waiting == 1
    calls.check()
    assert future.result(0) is None
    assert calls.num_waiting == 0


def test_after_its_end_nobody_waits(calls: ThreadCalls) -> None:
    end = RuntimeError("the end")
    condition = calls.when(lambda: False)
    calls.run()
    cancelled, open_call = calls.call(lambda: 7), calls.call(lambda: 7)
    cancelled.cancel()
    calls.close(end)
    for future in (condition, open_call, calls.call(lambda: 7), calls.when(lambda: True)):
        assert future.exception(0) is end
    assert calls.is_empty
