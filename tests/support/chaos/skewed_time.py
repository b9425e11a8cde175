"""Clocks that a test can shift while the process runs; install them before any module binds a clock."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any


class Clock:
    """A real clock plus an error in seconds, read from a shared value if one is set."""

    def __init__(self, real: Callable[[], float]) -> None:
        self._real = real
        self.ahead: Any = None

    def __call__(self) -> float:
        return self._real() + (float(self.ahead.value) if self.ahead is not None else 0.0)


wall, monotonic = Clock(time.time), Clock(time.monotonic)


def install() -> None:
    time.time, time.monotonic = wall, monotonic


def follow(wall_ahead: Any, monotonic_ahead: Any) -> None:
    """Set the clocks of this process ahead by the seconds in these shared values, from now on."""
    wall.ahead, monotonic.ahead = wall_ahead, monotonic_ahead
