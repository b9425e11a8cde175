"""An error on the command line is reported as one line and an exit code."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import redis
import typer

from fedqueue.errors import ClientTaken, ConfigurationError, FedqueueError, RunNotFound, ServerUnavailable, TaskError
from fedqueue.exit_codes import run_app


def app_that(act: Callable[..., Any]) -> typer.Typer:
    app = typer.Typer(pretty_exceptions_enable=False)

    @app.command()
    def command(number: int = 0) -> None:
        act()

    return app


def outcome(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], act: Callable[..., Any], *arguments: str
) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["program", *arguments])
    with pytest.raises(SystemExit) as ended:
        run_app(app_that(act))
    return int(ended.value.code or 0), capsys.readouterr().err


def raising(error: Any) -> Callable[..., Any]:
    def act() -> None:
        raise error

    return act


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigurationError("stop.seconds", -1, "must be greater than 0"), 2),
        (TaskError("there is no file task.py"), 2),
        (RunNotFound("digits"), 1),
        (ClientTaken("client c0 is served"), 1),
        (ServerUnavailable("no Redis"), 1),
        (FedqueueError("anything else"), 1),
    ],
)
def test_error_of_fedqueue_is_one_line_and_an_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Any, code: int
) -> None:
    got, printed = outcome(monkeypatch, capsys, raising(error))
    assert got == code
    assert printed == f"fedqueue: {error}\n"


def test_error_of_redis_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    got, printed = outcome(monkeypatch, capsys, raising(redis.ConnectionError("gone away")))
    assert got == 1
    assert printed.startswith("fedqueue: ")
    assert "gone away" in printed
    assert printed.count("\n") == 1


@pytest.mark.parametrize("arguments", [["--bogus"], ["surplus"], ["--number", "many"]])
def test_wrong_usage_is_exit_code_2_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    got, printed = outcome(monkeypatch, capsys, lambda: None, *arguments)
    assert got == 2
    assert "Error" in printed
    assert "Traceback" not in printed


def test_success_is_exit_code_0_and_silent(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert outcome(monkeypatch, capsys, lambda: None) == (0, "")


def test_exit_code_of_the_command_is_kept(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert outcome(monkeypatch, capsys, raising(typer.Exit(1)))[0] == 1


def test_interrupt_is_exit_code_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    got, printed = outcome(monkeypatch, capsys, raising(KeyboardInterrupt()))
    assert got == 130
    assert "Traceback" not in printed


def test_unforeseen_error_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["program"])
    with pytest.raises(ZeroDivisionError):
        run_app(app_that(raising(ZeroDivisionError())))


LOST = """
import os, signal, sys
from fedqueue.exit_codes import exit_at_once
class Finalized:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
handlers = {"raises": lambda *_: sys.exit(0), "ends": exit_at_once}
signal.signal(signal.SIGTERM, handlers[sys.argv[1]])
Finalized()
sys.exit("it goes on")
"""


@pytest.mark.slow
def test_signal_inside_a_finalizer_still_ends_the_process() -> None:
    ends, raises = (
        subprocess.run([sys.executable, "-c", LOST, how], capture_output=True, check=False)
        for how in ("ends", "raises")
    )
    assert (ends.returncode, ends.stderr) == (0, b"")
    assert raises.stderr.endswith(b"it goes on\n"), "without the workaround the signal should be lost"


THREADS = """
import sys, threading, time
import typer
from fedqueue import exit_codes

exit_codes.THREADS_SECONDS = 0.3
app = typer.Typer()

@app.command()
def command(seconds: float):
    threading.Thread(target=time.sleep, args=(seconds,), name="uploads").start()
    raise typer.Exit(3)

exit_codes.run_app(app)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("seconds", "said"), [("1000", ["uploads"]), ("0.01", [])])
def test_process_does_not_wait_for_threads_that_do_not_end(seconds: str, said: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", THREADS, seconds], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 3
    assert [name for name in ("uploads",) if name in done.stderr] == said
