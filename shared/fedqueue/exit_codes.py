"""Exit codes of both command lines, and how a process ends with one of them.

| code | meaning |
|---|---|
| 0 | done |
| 1 | failed |
| 2 | wrong usage, configuration or task |
| 130 | interrupted from the keyboard |
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

import typer

from fedqueue.errors import ConfigurationError, FedqueueError, TaskError
from fedqueue.exception_text import printable

DONE, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130
THREADS_SECONDS = 5.0
"""How long a process that has done its work waits for threads that a task has started."""


class ForeignThread(threading.Thread):
    """A daemon for code that may hang, with locks that Python needs when it ends."""

    given_up = False
    """Whether the process is to end without it."""

    def __init__(self, target: Callable[[], None], name: str) -> None:
        super().__init__(target=target, name=name, daemon=True)


def stop_signals() -> tuple[signal.Signals, ...]:
    """The signals that end a process in an orderly way: SIGTERM, SIGINT, and SIGHUP unless `nohup` made it ignored."""
    hangup = getattr(signal, "SIGHUP", None)  # not on Windows
    lost_terminal = () if hangup is None or signal.getsignal(hangup) is signal.SIG_IGN else (hangup,)
    return (signal.SIGTERM, signal.SIGINT, *lost_terminal)


def run_app(app: typer.Typer) -> None:
    """Run a command line; a FedqueueError or an error of Redis becomes one line on stderr and an exit code.

    The process ends at most THREADS_SECONDS later, whatever threads a task has started.
    """
    before = set(threading.enumerate())
    try:
        _run(app)
    except BaseException as error:
        code = error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else FAILED
        threads = set(threading.enumerate()) - before
        if isinstance(error, SystemExit) and any(isinstance(t, ForeignThread) and t.given_up for t in threads):
            _end_at_once(code)
        _end_without(threads, code)
        raise


def _end_at_once(code: int) -> NoReturn:
    """End this process without Python's own end, which waits for threads and for the locks that they hold."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _end_without(threads: set[threading.Thread], code: int) -> None:
    """End this process with `code` after THREADS_SECONDS if Python would still wait for one of the threads then."""
    if all(thread.daemon for thread in threads):
        return

    def end() -> None:
        time.sleep(THREADS_SECONDS)
        names = ", ".join(sorted(thread.name for thread in threads if thread.is_alive() and not thread.daemon))
        with contextlib.suppress(OSError, ValueError):
            print(  # noqa: T201
                f"fedqueue: the process ends without threads of the task that have not ended: {names}; end them in "
                "the task, or make them daemons",
                file=sys.stderr,
                flush=True,
            )
            sys.stdout.flush()
        os._exit(code)

    threading.Thread(target=end, daemon=True).start()


def _run(app: typer.Typer) -> None:
    try:
        app()  # raises SystemExit, with code 2 and a usage line for wrong arguments
    except (ConfigurationError, TaskError) as error:
        _fail(str(error), USAGE)
    except FedqueueError as error:
        _fail(str(error), FAILED)
    except KeyboardInterrupt:
        _fail("interrupted", INTERRUPTED)
    except Exception as error:
        from redis import RedisError  # late: `--help` does not need it

        if not isinstance(error, RedisError):
            raise
        _fail(f"Redis: {error}", FAILED)


def _fail(message: str, code: int) -> None:
    print(f"fedqueue: {printable(message)}", file=sys.stderr)  # noqa: T201
    sys.exit(code)


def exit_at_once(signum: int, frame: FrameType | None) -> NoReturn:
    """A signal handler for a process that has nothing to clean up yet.

    The handler exits instead of raising. Python discards an exception from a handler that runs inside a finalizer or
    a weak reference's callback, and every import runs such callbacks.
    """
    os._exit(DONE)
