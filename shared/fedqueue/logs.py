"""Logs: how a process writes its own, and the last line of another process's."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import TextIO


def configure_logging(to: TextIO | None = None, level: int = logging.INFO) -> None:
    """Human-readable lines on `to` (stderr by default), coloured where that is a terminal."""
    stream = to or sys.stderr
    configure_structlog(stream, level)
    logging.basicConfig(stream=stream, level=logging.WARNING, format="%(asctime)s %(name)s: %(message)s", force=True)


def configure_structlog(stream: TextIO, level: int = logging.INFO) -> None:
    """Send fedqueue's own log lines to `stream`; the standard library's logging stays as it is."""
    import structlog  # not by commands that log nothing

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


def log_level(verbose: bool, quiet: bool) -> int:
    """The lowest level that is logged with these options; raises typer.BadParameter if both are given."""
    if verbose and quiet:
        from typer import BadParameter

        raise BadParameter("not together with --verbose", param_hint="--quiet")
    return logging.DEBUG if verbose else logging.WARNING if quiet else logging.INFO


def last_line(log: Path) -> str:
    """The last line of a log file that is not blank, for an error message."""
    lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    return lines[-1] if lines else "(its log is empty)"
