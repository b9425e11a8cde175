"""`fedqueue coordinator`, as it is, in a process that kills or stops itself where the test wants it to."""

from __future__ import annotations

import functools
import os
import signal
from pathlib import Path
from typing import Any

import crash_points
import skewed_time

import fedqueue_coordinator.service.coordinator_store
from fedqueue_coordinator.cli import main as cli
from fedqueue_coordinator.service import coordinator

NO_POINT = -1


class SelfHarm:
    """Called at each point: at the n-th passage of the armed one the process sends itself the armed signal."""

    def __init__(self, armed: Any) -> None:
        self._armed = armed  # shared: index of the point or NO_POINT, passages to go, signal

    def __call__(self, point: str) -> None:
        if self._armed[0] == NO_POINT or crash_points.POINTS[self._armed[0]] != point:
            return
        self._armed[1] -= 1
        if self._armed[1] <= 0:
            self._armed[0] = NO_POINT
            os.kill(os.getpid(), self._armed[2])


def main(arguments: list[str], log: Path, wall: Any, monotonic: Any, armed: Any) -> None:
    """Runs in the new process; `fedqueue status` shows its pid as the leader's name."""
    from fleet import settle

    settle(log, ["fedqueue", "coordinator", *arguments])
    skewed_time.follow(wall, monotonic)
    harm = SelfHarm(armed)
    crash_points.StoreWithPoints.at = staticmethod(harm)
    fedqueue_coordinator.service.coordinator_store.CoordinatorStore = crash_points.StoreWithPoints  # type: ignore[misc]
    coordinator.Coordinator = functools.partial(coordinator.Coordinator, failpoint=harm)  # type: ignore[assignment, misc]
    fedqueue_coordinator.service.coordinator_store.new_owner = lambda: f"pid-{os.getpid()}"
    signal.signal(signal.SIGINT, signal.default_int_handler)
    cli.main()
