"""Logs are plain lines that show no data."""

from __future__ import annotations

import io
import logging

import pytest
import structlog

from fedqueue.logs import configure_logging, log_level


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
