"""Logs are plain lines that show no data."""

from __future__ import annotations

import datetime
import io
import json
import logging
import threading
from pathlib import Path

import pytest
import structlog

from fedqueue.logs import configure_logging, log_level, rotate, say_at_end


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


def test_json_log_has_an_object_in_each_line() -> None:
    stream = io.StringIO()
    configure_logging(stream, style="json", fields={"run": "digits"})
    log = structlog.get_logger("fedqueue")
    with structlog.contextvars.bound_contextvars(job="j-1", client="c0"):
        log.info("update posted", base=3)
        try:
            raise ValueError("two\nlines, é")
        except ValueError:
            log.exception("training failed")
    logging.getLogger("some.library").warning("from %s", "a library")
    posted, failed, foreign = map(json.loads, stream.getvalue().splitlines())
    at = datetime.datetime.fromisoformat(posted.pop("timestamp"))
    assert at.utcoffset() == datetime.timedelta(0)
    job = {"run": "digits", "job": "j-1", "client": "c0"}
    assert posted == {"event": "update posted", "level": "info", "base": 3, **job}
    assert failed["level"] == "error"
    assert failed["exception"].endswith("ValueError: two\nlines, é")
    assert {**failed, **job} == failed
    assert (foreign["event"], foreign["level"], foreign["logger"]) == ("from a library", "warning", "some.library")


def test_text_log_names_the_run_also_on_other_threads() -> None:
    stream = io.StringIO()
    configure_logging(stream, fields={"run": "digits"})
    log = structlog.get_logger("fedqueue")
    with structlog.contextvars.bound_contextvars(job="j-1"):
        log.info("mine")
        thread = threading.Thread(target=lambda: log.info("of a thread"))
        thread.start()
        thread.join()
    mine, other = stream.getvalue().splitlines()
    assert "job=j-1 run=digits" in mine
    assert "run=digits" in other
    assert "job" not in other


def test_a_field_that_a_line_names_itself_is_kept() -> None:
    stream = io.StringIO()
    configure_logging(stream, style="json", fields={"run": "digits"})
    structlog.get_logger("fedqueue").info("ready", run="another")
    assert json.loads(stream.getvalue())["run"] == "another"


def test_last_words_are_an_object_in_a_json_log(capsys: pytest.CaptureFixture[str]) -> None:
    stream = io.StringIO()
    configure_logging(stream, style="json", fields={"run": "digits"})
    say_at_end("fedqueue-worker", "the run has ended", "json")
    said = json.loads(stream.getvalue())
    assert (said["event"], said["program"], said["run"]) == ("the run has ended", "fedqueue-worker", "digits")
    say_at_end("fedqueue-worker", "the run has ended", "text")
    assert capsys.readouterr().err == "fedqueue-worker: the run has ended\n"


@pytest.mark.parametrize(
    ("options", "configured", "level"),
    [
        ({}, "warning", logging.WARNING),
        ({}, "debug", logging.DEBUG),
        ({}, "error", logging.ERROR),
        ({"verbose": True}, "error", logging.DEBUG),
        ({"quiet": True}, "debug", logging.WARNING),
    ],
)
def test_option_precedes_the_configured_log_level(options: dict[str, bool], configured: str, level: int) -> None:
    assert log_level(**{"verbose": False, "quiet": False, **options}, configured=configured) == level
