"""Fixtures for the commands: an empty folder, and `fedqueue` in this process."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedqueue_coordinator.cli import main as cli
from fedqueue_coordinator.operator import runs
from tests.support.command_line import CommandLine


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Enter an empty folder, without a server on the default port, so that no test finds a run by accident."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(runs, "DEFAULT_URL", f"unix://{tmp_path}/none.sock")
    return tmp_path


@pytest.fixture
def call(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    """`fedqueue` in that folder."""
    return CommandLine("fedqueue", cli.main, monkeypatch, capsys)
