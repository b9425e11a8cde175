"""Errors on the command line are one line and an exit code."""

from __future__ import annotations

import io
import logging
import subprocess
import sys

import pytest
import redis
import structlog
import typer

from fedqueue import terminal
from fedqueue.errors import ClientTaken, ConfigurationError, FedqueueError, RunNotFound, ServerUnavailable, TaskError


def app_that(act) -> typer.Typer:
    app = typer.Typer(pretty_exceptions_enable=False)

    @app.command()
    def command(number: int = 0) -> None:
        act()

    return app


def outcome(monkeypatch, capsys, act, *arguments: str) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["program", *arguments])
    with pytest.raises(SystemExit) as ended:
        terminal.main(app_that(act))
    return int(ended.value.code or 0), capsys.readouterr().err


def raising(error):
    def act():
        raise error

    return act


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigurationError("stop.seconds", -1, "from 0"), 2),
        (TaskError("there is no file task.py"), 2),
        (RunNotFound("digits"), 1),
        (ClientTaken("client c0 is served"), 1),
        (ServerUnavailable("no Redis"), 1),
        (FedqueueError("anything else"), 1),
    ],
)
def test_error_of_fedqueue_is_one_line_and_an_exit_code(monkeypatch, capsys, error, code):
    got, printed = outcome(monkeypatch, capsys, raising(error))
    assert got == code
    assert printed == f"fedqueue: {error}\n"


def test_error_of_redis_is_one_line(monkeypatch, capsys):
    got, printed = outcome(monkeypatch, capsys, raising(redis.ConnectionError("gone away")))
    assert got == 1
    assert printed.startswith("fedqueue: ")
    assert "gone away" in printed
    assert printed.count("\n") == 1


@pytest.mark.parametrize("arguments", [["--bogus"], ["surplus"], ["--number", "many"]])
def test_wrong_usage_is_exit_code_2_without_a_traceback(monkeypatch, capsys, arguments):
    got, printed = outcome(monkeypatch, capsys, lambda: None, *arguments)
    assert got == 2
    assert "Error" in printed
    assert "Traceback" not in printed


def test_success_is_exit_code_0_and_silent(monkeypatch, capsys):
    assert outcome(monkeypatch, capsys, lambda: None) == (0, "")


def test_exit_code_of_the_command_is_kept(monkeypatch, capsys):
    assert outcome(monkeypatch, capsys, raising(typer.Exit(1)))[0] == 1


def test_interrupt_is_exit_code_130(monkeypatch, capsys):
    got, printed = outcome(monkeypatch, capsys, raising(KeyboardInterrupt()))
    assert got == 130
    assert "Traceback" not in printed


def test_unforeseen_error_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["program"])
    with pytest.raises(ZeroDivisionError):
        terminal.main(app_that(raising(ZeroDivisionError())))


def test_logs_are_plain_lines_where_the_output_is_no_terminal():
    stream = io.StringIO()
    terminal.configure_logging(stream)
    structlog.get_logger("fedqueue").info("client joined", client="c0")
    structlog.get_logger("fedqueue").debug("too detailed")
    logging.getLogger("some.library").warning("from a library")
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2
    assert "client joined" in lines[0]
    assert "client=c0" in lines[0]
    assert "\x1b" not in lines[0]
    assert lines[1].endswith("some.library: from a library")


def test_exceptions_in_logs_show_no_variables():
    stream = io.StringIO()
    terminal.configure_logging(stream)
    try:
        row_of_a_patient = "age 54"
        raise ValueError(f"{len(row_of_a_patient)} columns")
    except ValueError:
        structlog.get_logger("fedqueue").exception("training failed")
    assert "ValueError: 6 columns" in stream.getvalue()
    assert "age 54" not in stream.getvalue().replace('"age 54"', "")


LOST = """
import os, signal, sys
from fedqueue.terminal import exit_at_once
class Finalized:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
handlers = {"raises": lambda *_: sys.exit(0), "ends": exit_at_once}
signal.signal(signal.SIGTERM, handlers[sys.argv[1]])
Finalized()
sys.exit("it goes on")
"""


def test_signal_that_comes_inside_a_finalizer_ends_the_process_all_the_same():
    ends, raises = (
        subprocess.run([sys.executable, "-c", LOST, how], capture_output=True, check=False)
        for how in ("ends", "raises")
    )
    assert (ends.returncode, ends.stderr) == (0, b"")
    assert raises.stderr.endswith(b"it goes on\n"), "or else there would be no need of it"
