"""What both command lines share: logs, one-line errors, exit codes (0 done, 1 failed, 2 usage or configuration)."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from types import FrameType
from typing import NoReturn, TextIO

import typer

from fedqueue.errors import ConfigurationError, FedqueueError, TaskError

DONE, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130


def configure_logging(to: TextIO | None = None, level: int = logging.INFO) -> None:
    """Human-readable lines on `to` (stderr by default), coloured where that is a terminal."""
    import structlog  # not by commands that log nothing

    stream = to or sys.stderr
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="%H:%M:%S"),
            structlog.dev.ConsoleRenderer(colors=stream.isatty(), exception_formatter=structlog.dev.plain_traceback),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.WriteLoggerFactory(stream),
        cache_logger_on_first_use=False,
    )
    logging.basicConfig(stream=stream, level=logging.WARNING, format="%(asctime)s %(name)s: %(message)s", force=True)


def main(app: typer.Typer) -> None:
    """Run the command line; an error that fedqueue raises on purpose is one line on stderr and an exit code."""
    try:
        app()  # ends with SystemExit: 2 and a usage line where the arguments are wrong
    except (ConfigurationError, TaskError) as error:
        _fail(str(error), USAGE)
    except FedqueueError as error:
        _fail(str(error), FAILED)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except Exception as error:
        from redis import RedisError  # `--help` does without

        if not isinstance(error, RedisError):
            raise
        _fail(f"Redis: {error}", FAILED)


def _fail(message: str, code: int) -> None:
    print(f"fedqueue: {message}", file=sys.stderr)  # noqa: T201
    sys.exit(code)


def exit_at_once(signum: int, frame: FrameType | None) -> NoReturn:
    """A signal handler for a process that has nothing to give back yet.

    It raises nothing: what a handler raises is lost where a finalizer or a weak reference's callback happens to run,
    and each import runs one.
    """
    os._exit(DONE)


def last_line(log: Path) -> str:
    """The last line of a log that says something, for an error message."""
    lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    return lines[-1] if lines else "(nothing in its log)"
