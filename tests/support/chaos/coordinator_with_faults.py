"""Runs the unmodified `fedqueue coordinator` in a process that kills or stops itself at a point chosen by the test."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import fedqueue_coordinator.service.coordinator_store
from fedqueue_coordinator.cli import main as cli
from fedqueue_coordinator.service import coordinator
from tests.support.chaos import crash_points, skewed_time
from tests.support.forked import settle

NO_POINT = -1


class SelfHarm:
    """Called at each crash point; the process sends itself a signal at the n-th passage of the armed point."""

    def __init__(self, armed: Any) -> None:
        self._armed = armed  # shared: index of the point or NO_POINT, remaining passages, signal

    def __call__(self, point: str) -> None:
        if self._armed[0] == NO_POINT or crash_points.POINTS[self._armed[0]] != point:
            return
        self._armed[1] -= 1
        if self._armed[1] <= 0:
            self._armed[0] = NO_POINT
            os.kill(os.getpid(), self._armed[2])


def main(arguments: list[str], log: Path, wall: Any, monotonic: Any, armed: Any) -> None:
    """Run in the new process; `fedqueue status` shows the pid of this process as the leader's name."""
    settle(log, ["fedqueue", "coordinator", *arguments])
    skewed_time.follow(wall, monotonic)
    harm = SelfHarm(armed)
    crash_points.StoreWithPoints.at = staticmethod(harm)
    fedqueue_coordinator.service.coordinator_store.CoordinatorStore = crash_points.StoreWithPoints  # type: ignore[misc]
    patched = functools.partial(coordinator.Coordinator, failpoint=harm)
    coordinator.Coordinator = patched  # type: ignore[assignment, misc]
    fedqueue_coordinator.service.coordinator_store.new_owner = lambda: f"pid-{os.getpid()}"
    cli.main()
