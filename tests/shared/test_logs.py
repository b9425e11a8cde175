"""Logs are plain lines that show no data."""

from __future__ import annotations

import io
import logging
from pathlib import Path

import pytest
import structlog

from fedqueue.logs import configure_logging, log_level, rotate


def test_logs_are_plain_lines_where_the_output_is_no_terminal() -> None:
    stream = io.StringIO()
    configure_logging(stream)
    structlog.get_logger("fedqueue").info("client joined", client="c0")
    structlog.get_logger("fedqueue").debug("too detailed")
    logging.getLogger("some.library").warning("from a library")
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2
    assert "client joined" in lines[0]
    assert "client=c0" in lines[0]
    assert "\x1b" not in lines[0]
    assert lines[1].endswith("some.library: from a library")


def test_exceptions_in_logs_show_no_variables() -> None:
    stream = io.StringIO()
    configure_logging(stream)
    try:
        row_of_a_patient = "age 54"
        raise ValueError(f"{len(row_of_a_patient)} columns")
    except ValueError:
        structlog.get_logger("fedqueue").exception("training failed")
    assert "ValueError: 6 columns" in stream.getvalue()
    assert "age 54" not in stream.getvalue().replace('"age 54"', "")


@pytest.mark.parametrize(
    ("verbose", "quiet", "level"),
    [(False, False, logging.INFO), (True, False, logging.DEBUG), (False, True, logging.WARNING)],
)
def test_verbose_and_quiet_set_the_log_level(verbose: bool, quiet: bool, level: int) -> None:
    assert log_level(verbose, quiet) == level


def test_large_log_is_moved_and_its_writer_continues(tmp_path: Path) -> None:
    log = tmp_path / "worker-0.log"
    with log.open("ab", buffering=0) as writer:
        writer.write(b"first" + bytes(3000) + b"last")
        rotate(log, limit=1000)
        writer.write(b"later")
        assert log.read_bytes().startswith(b"(this log had 0 MiB: its last 0 MiB are in worker-0.log.1)\n")
        assert log.read_bytes().endswith(b")\nlater")
        assert (tmp_path / "worker-0.log.1").read_bytes() == bytes(996) + b"last"
        rotate(log, limit=1000)
    assert (tmp_path / "worker-0.log.1").stat().st_size == 1000


def test_log_is_emptied_where_it_cannot_be_kept(tmp_path: Path) -> None:
    log = tmp_path / "worker-0.log"
    (tmp_path / "worker-0.log.1").mkdir()
    log.write_bytes(bytes(3000))
    rotate(log, limit=1000)
    assert log.read_text().startswith("(this log had 0 MiB: they could not be kept (")


def test_log_that_was_deleted_is_no_error(tmp_path: Path) -> None:
    rotate(tmp_path / "worker-0.log")
