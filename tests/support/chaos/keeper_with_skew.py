"""Runs the unmodified `fedqueue-keeper` in a process whose clocks the test can shift."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedqueue_keeper import cli
from tests.support.chaos import skewed_time
from tests.support.forked import settle


def main(arguments: list[str], log: Path, wall: Any, monotonic: Any) -> None:
    """Run in the new process."""
    settle(log, ["fedqueue-keeper", *arguments])
    skewed_time.follow(wall, monotonic)
    cli.main()
