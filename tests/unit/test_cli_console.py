"""How commands end."""

from __future__ import annotations

import pytest
from rich.console import Console

from flexpipe_serve.cli_console import run_command
from flexpipe_serve.errors import ConfigError


def test_its_own_status(capsys: pytest.CaptureFixture[str]) -> None:
    def command(console: Console) -> int:
        console.print("x" * 150)
        return 7

    assert run_command(command) == 7
    assert capsys.readouterr().out == "x" * 150 + "\n", "a pipe is wide"


@pytest.mark.parametrize("error", [ConfigError("no [such] thing"), FileNotFoundError("no [such] thing")])
def test_an_error_of_the_user_is_a_line(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    def command(console: Console) -> int:
        raise error

    assert run_command(command) == 1
    assert capsys.readouterr().err == "error: no [such] thing\n"


def test_an_interrupt_shows_no_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    def command(console: Console) -> int:
        raise KeyboardInterrupt

    assert run_command(command) == 130
    assert capsys.readouterr() == ("", "")


def test_a_bug_is_not_hidden() -> None:
    def command(console: Console) -> int:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_command(command)
