"""What a test needs to let a coordinator die within its own process: a store, a clock, and the point of its death.

At the step where the coordinator is to die, `Killed` is raised. As after SIGKILL, nothing more is sent to Redis.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Protocol

from fedqueue.protocol.stream_entry import StreamEntry
from tests.support.chaos.crash_points import StoreWithPoints


class Killed(BaseException):
    """Stands for SIGKILL within one process."""


class Script:
    """Counts the passages of each point; kills the coordinator at the n-th passage of one point."""

    def __init__(self, point: str = "", passage: int = 0) -> None:
        self.passed: Counter[str] = Counter()
        self._point, self._passage = point, passage

    def __call__(self, point: str) -> None:
        self.passed[point] += 1
        if point == self._point and self.passed[point] == self._passage:
            raise Killed(point)


class Party(Protocol):
    """The others that take part: workers, or sites and keepers."""

    def act(self) -> None: ...


class MortalStore(StoreWithPoints):
    """The coordinator's store; lets the other parties act before the coordinator waits for entries."""

    others: Party

    def receive(self, block_seconds: float, count: int = 32) -> list[StreamEntry]:
        self.others.act()
        self.at("before receive")
        return super().receive(0.001, count)


def dead_after(at: Callable[[str], None]) -> Callable[[str], None]:
    """Calls `at` with each point; once it has raised Killed, every further point raises it too."""
    dead = False

    def hook(point: str) -> None:
        nonlocal dead
        if dead:
            raise Killed(point)
        try:
            at(point)
        except Killed:
            dead = True
            raise

    return hook


def ticking_clock() -> Callable[[], float]:
    """A clock that is a second later at each look, so that every backoff is over by the next tick."""
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += 1.0
        return now

    return clock
