"""Faults at chosen moments of a refactoring."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from unittest import mock

from leaks import settle

from flexpipe_serve.engine.engine import Engine
from flexpipe_serve.refactor.commands import Command
from flexpipe_serve.refactor.coordinator import Coordinator
from flexpipe_serve.refactor.record import RefactorRecord, RefactorRequest


@contextmanager
def before_command(kind: type[Command], act: Callable[[], None], *, index: int = 0) -> Iterator[threading.Event]:
    """Calls ``act`` in the refactoring's thread before its command number ``index`` of a kind is issued.

    The event is set then.
    """
    issue = Coordinator._issue
    done = threading.Event()
    num_seen = 0

    def issue_or_act(coordinator: Coordinator, command: Command) -> object:
        nonlocal num_seen
        if isinstance(command, kind) and not done.is_set():
            if num_seen == index:
                act()
                done.set()
            num_seen += 1
        return issue(coordinator, command)

    with mock.patch.object(Coordinator, "_issue", issue_or_act):
        yield done


@contextmanager
def before_answer(kind: type[Command], act: Callable[[], None]) -> Iterator[threading.Event]:
    """Calls ``act`` when a command of a kind was carried out, before the refactoring hears of it."""
    on_answer = Coordinator._on_answer
    done = threading.Event()

    def act_and_answer(coordinator: Coordinator, command: Command, answer: Future[object]) -> None:
        if isinstance(command, kind) and not done.is_set():
            act()
            done.set()
        on_answer(coordinator, command, answer)

    with mock.patch.object(Coordinator, "_on_answer", act_and_answer):
        yield done


def refactor(engine: Engine, request: RefactorRequest) -> RefactorRecord:
    """Carry one out. Returns its record, when what follows from its end is done too."""
    record = engine._control.submit(engine._start_refactoring, request).result()
    settle(engine)
    found = engine.refactoring(record.id)
    assert found is not None
    return found
