"""`-v` and `-q` of the commands that start processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import structlog

from fedqueue_coordinator.operator import child_processes, local_run
from fedqueue_coordinator.operator.local_workers import LocalWorkers
from fedqueue_coordinator.operator.run_folder import RunFolder
from tests.support.command_line import CommandLine


@pytest.mark.parametrize(
    ("options", "kinds"),
    [([], ["info"]), (["-v"], ["debug", "info"]), (["-q"], ["info"]), (["-v", "-q"], ["debug", "info"])],
)
def test_verbose_run_logs_debug_lines(
    call: CommandLine, folder: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], kinds: list[str]
) -> None:
    """`-q` leaves the log as it is."""
    (folder / "federation.toml").write_text('name = "r"\n[task]\nentrypoint = "task.py:Absent"\n[stop]\nversions = 1\n')

    def run_local(
        settings: object, launch: object, folder: object, quiet: bool, resume: bool, verbose: bool, overwrite: bool
    ) -> int:
        assert (quiet, verbose) == ("-q" in options, "-v" in options)
        log = structlog.get_logger()
        log.debug("a debug line")
        log.info("an info line")
        return 0

    monkeypatch.setattr(local_run, "run_local", run_local)
    assert call("run", "federation.toml", *options)[0] == 0
    log = (folder / "runs" / "r" / "coordinator.log").read_text()
    assert [kind for kind in ("debug", "info") if f"{kind} line" in log] == kinds


@pytest.mark.parametrize("verbose", [True, False])
def test_workers_of_a_verbose_run_are_verbose(folder: Path, monkeypatch: pytest.MonkeyPatch, verbose: bool) -> None:
    started: list[Sequence[str]] = []

    def start(command: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
        log.parent.mkdir(exist_ok=True)
        log.touch()
        started.append(command)

    monkeypatch.setattr(child_processes, "start", start)
    monkeypatch.setattr(child_processes, "stop", lambda processes: None)
    LocalWorkers(folder / "federation.toml", [], 2, ["c0"], "unix://absent", RunFolder(folder), verbose).stop()
    assert ("--verbose" in started[0]) is verbose
