"""Logs: how a process writes its own, and the last line of another process's; output whose reader may go away."""

from __future__ import annotations

import contextlib
import datetime
import io
import json
import logging
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TextIO

ECHO_SECONDS = 60.0
"""A warning that is repeated sooner than this is not shown on the console again."""

NO_FIELDS: Mapping[str, str] = MappingProxyType({})

MAX_LOG = 16 * 2**20
"""Bytes of a worker's log file, above which it is moved to a second file and begun again."""


def configure_logging(
    to: TextIO | None = None,
    level: int = logging.INFO,
    style: Literal["text", "json"] = "text",
    fields: Mapping[str, str] = NO_FIELDS,
) -> None:
    """Log to `to` (stderr by default): lines for people, coloured where that is a terminal, or JSON objects.

    Each line of fedqueue has `fields`, such as the run's name; those of a job have the client and the job.
    """
    stream = to or sys.stderr
    configure_structlog(stream, level, style, fields)
    logging.basicConfig(stream=stream, level=logging.WARNING, format="%(asctime)s %(name)s: %(message)s", force=True)
    if style == "json":
        for handler in logging.root.handlers:
            handler.setFormatter(_JsonLines())


def configure_structlog(
    stream: TextIO,
    level: int = logging.INFO,
    style: Literal["text", "json"] = "text",
    fields: Mapping[str, str] = NO_FIELDS,
) -> None:
    """Send fedqueue's own log lines to `stream`; the standard library's logging stays as it is."""
    import structlog  # not by commands that log nothing

    def add_fields(logger: Any, name: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        for field, value in fields.items():
            event.setdefault(field, value)
        return event

    last: list[Any] = (
        [
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.ExceptionRenderer(),
            structlog.processors.JSONRenderer(default=str, ensure_ascii=False),
        ]
        if style == "json"
        else [
            structlog.processors.TimeStamper(fmt="%H:%M:%S"),
            structlog.dev.ConsoleRenderer(colors=stream.isatty(), exception_formatter=structlog.dev.plain_traceback),
        ]
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            add_fields,
            structlog.processors.add_log_level,
            *last,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.WriteLoggerFactory(stream),
        cache_logger_on_first_use=False,
    )


def say_at_end(program: str, text: str, style: Literal["text", "json"]) -> None:
    """Write a line about the end of `program` to stderr; in a JSON log, as an object of the level `info`."""
    if style == "json":
        import structlog

        structlog.get_logger("fedqueue").info(text, program=program)
    else:
        import typer

        typer.echo(f"{program}: {text}", err=True)


class _JsonLines(logging.Formatter):
    """A line of another library's log as the JSON object that fedqueue's own lines are."""

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.datetime.fromtimestamp(record.created, datetime.UTC).isoformat().replace("+00:00", "Z")
        line = {"timestamp": at, "level": record.levelname.lower(), "event": record.getMessage(), "logger": record.name}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def log_level(verbose: bool, quiet: bool, configured: str = "info") -> int:
    """The lowest level that is logged with these options, or else as configured (`observability.log_level`).

    Raises typer.BadParameter if both options are given.
    """
    if verbose and quiet:
        from typer import BadParameter

        raise BadParameter("not together with --verbose", param_hint="--quiet")
    if verbose or quiet:
        return logging.DEBUG if verbose else logging.WARNING
    return int(logging.getLevelNamesMapping()[configured.upper()])


def last_line(log: Path) -> str:
    """The last line of a log file that is not blank, for an error message."""
    lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    return lines[-1] if lines else "(its log is empty)"


def rotate(log: Path, limit: int = MAX_LOG) -> None:
    """Move what `log` has to `log.1` where it has more than `limit` bytes, of which the last `limit` are kept.

    Processes that have opened `log` to append to it need no word: they continue at its new end. What they write in the
    moment of the move may be missing. On a full disk nothing is kept.
    """
    try:
        size = log.stat().st_size
    except OSError:  # deleted while its writer is running
        return
    if size <= limit:
        return
    former = log.with_name(f"{log.name}.1")
    try:
        with log.open("rb") as source, former.open("wb") as target:
            source.seek(max(0, size - limit))
            shutil.copyfileobj(source, target)
        kept = f"its last {limit / 2**20:.0f} MiB are in {former.name}"
    except OSError as error:
        with contextlib.suppress(OSError):
            former.unlink()
        kept = f"they could not be kept ({error.strerror})"
    with contextlib.suppress(OSError), log.open("r+b") as file:
        file.truncate(0)
        file.write(f"(this log had {size / 2**20:.0f} MiB: {kept})\n".encode())


# Warnings on the console, of a process whose log is a file


@contextlib.contextmanager
def warnings_shown(show: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> Iterator[None]:
    """Pass each line that fedqueue logs as a warning or an error to `show` too, but the same one not again and again.

    `show` gets one line. The same event with the same fields is passed on once in ECHO_SECONDS.
    """
    import structlog

    shown: dict[str, float] = {}

    def echo(logger: Any, level: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        if level not in ("warning", "error", "critical", "exception"):
            return event
        fields = [f"{name}: {value}" for name, value in event.items() if name not in ("event", "level", "exc_info")]
        text, now = "; ".join([str(event["event"]), *fields]), clock()
        if now - shown.get(text, -ECHO_SECONDS) >= ECHO_SECONDS:
            shown[text] = now
            show(text)
        return event

    processors = structlog.get_config()["processors"]
    structlog.configure(processors=[echo, *processors])
    try:
        yield
    finally:
        structlog.configure(processors=processors)


# Output whose reader may go away


class _Outliving(io.FileIO):
    """A file whose writes never fail: text for a closed pipe, a lost terminal or a full disk is dropped."""

    def write(self, data: Any) -> int:
        with contextlib.suppress(OSError):
            written = super().write(data)
            if written is not None:
                return written
        return len(data)


def outlive_readers() -> None:
    """Let this process write to stdout and stderr for as long as it lives, whether or not their readers do.

    Otherwise `fedqueue run … | head`, a `tee` that ended or a full disk would end a training with an OSError.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        try:
            number = stream.fileno()
        except (AttributeError, OSError, ValueError):  # closed, or replaced by an object without a file
            continue
        stream.flush()
        raw = io.BufferedWriter(_Outliving(number, "w", closefd=False))
        wrapped = io.TextIOWrapper(raw, stream.encoding, "backslashreplace", line_buffering=True, write_through=True)
        setattr(sys, name, wrapped)
