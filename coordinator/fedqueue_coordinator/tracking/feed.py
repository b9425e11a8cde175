"""Calls hooks on threads of their own, so that no hook can hold up a run, end it or change it.

Each object with hooks has a thread and a queue. Where the queue is full, every second version that waits in it is left
out, and likewise rejections and clients; evaluations, the start and the end never are.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import structlog

from fedqueue.config.schema import Config
from fedqueue.exception_text import exception_with_place, one_line
from fedqueue.exit_codes import ForeignThread
from fedqueue_coordinator.core.observer import RunObserver
from fedqueue_coordinator.tracking.hooks import RunHooks, RunStart
from fedqueue_coordinator.tracking.narrator import HookCall, Narrator

if TYPE_CHECKING:  # imports torch
    from fedqueue_coordinator.core.federation import Federation

log = structlog.get_logger("fedqueue.coordinator")

MOST_WAITING = 10_000
"""Updates that are described by the calls that wait for one tracker, at most; a call without any counts as one."""
NOUNS = {"on_version": "versions", "on_rejection": "rejections", "on_client": "abandoned jobs"}


class HookFeed(RunObserver):
    """Tells the hooks of a run, by name, what its coordinator or simulation records.

    As a context manager, it ends the story where the run did not come to a result.
    """

    def __init__(
        self, config: Config, hooks: Sequence[tuple[str, RunHooks]], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._config, self._clock = config, clock
        self._narrator = Narrator()
        self._followers = [_Follower(name, of_name, clock) for name, of_name in hooks]
        self._begun = self._ended = False

    def begins(self, federation: Federation, now: float) -> None:
        """As `RunObserver.begins`; the hooks learn of the first beginning only."""
        counters = federation.run_counters
        self._narrator.resume(federation.version, counters.updates, counters.seconds)
        if not self._begun:
            self._begun = True
            self._pass_on(self._narrator.start(run_start(self._config, federation.version, time.time() - now)))

    def recorded(self, record: Mapping[str, Any]) -> None:
        """As `RunObserver.recorded`."""
        if self._followers and (call := self._narrator.tell(record)):
            self._pass_on(call)

    def end(self, summary: Mapping[str, Any]) -> None:
        """Tell the hooks that the run has ended, and wait until they have heard it, `trackers.end_seconds` at most."""
        if not self._begun or self._ended:
            return
        self._ended = True
        call, patience = self._narrator.end(summary), self._config.trackers.end_seconds
        deadline = self._clock() + patience
        for follower in self._followers:
            follower.end(call, hurry_at=deadline - patience / 2)
        for follower in self._followers:
            follower.wait(deadline, patience)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        progress = self._narrator.progress
        why = one_line(str(error) or type(error).__name__) if error else "its coordinator left it unfinished"
        self.end({
            "run": self._config.name, "complete": False, "stopped_because": why, "versions": progress.version,
            "updates_merged": progress.updates, "seconds": progress.seconds, "folder": None,
        })  # fmt: skip

    def _pass_on(self, call: HookCall) -> None:
        for follower in self._followers:
            follower.put(call)


def run_start(config: Config, version: int, started_at: float) -> RunStart:
    """What `on_start` is called with."""
    described = config.model_dump(mode="json")
    strategy, clients = config.aggregation.strategy, config.clients.ids
    return RunStart(config.name, strategy, config.seed, clients, described, version, started_at)


class _Follower:
    """The thread of one object with hooks, and the calls that wait for it."""

    def __init__(self, name: str, hooks: RunHooks, clock: Callable[[], float]) -> None:
        self._name, self._hooks, self._clock = name, hooks, clock
        self._waiting: deque[HookCall] = deque()
        self._size = 0  # of all calls that wait
        self._changed = threading.Condition()
        self._hurry_at: float | None = None
        self._left_out: Counter[str] = Counter()  # method → calls
        self._made: Counter[str] = Counter()
        self._present = ""  # the method that is being called
        self._gone = False  # it raised, or it was not waited for
        self._thread = ForeignThread(self._follow, f"tracker {name}")

    def put(self, call: HookCall) -> None:
        """Let the call wait for its turn."""
        with self._changed:
            if self._gone:
                return
            if not call.kept and self._size + call.size > MOST_WAITING:
                self._thin_out()
                if self._size + call.size > MOST_WAITING and self._waiting:  # full of calls that are kept
                    self._left_out[call.method] += 1
                    return
            self._waiting.append(call)
            self._size += call.size
            self._changed.notify()
        if self._thread.ident is None:
            self._thread.start()

    def _thin_out(self) -> None:
        """Leave out every second call that may be, from the second newest to the oldest."""
        if not self._left_out:
            log.warning(
                "tracker is slower than the run: versions are left out for it, evaluations and the end are not",
                tracker=self._name,
            )
        remaining: deque[HookCall] = deque()
        spare = False
        for call in reversed(self._waiting):
            if call.kept or not spare:
                remaining.appendleft(call)
            else:
                self._left_out[call.method] += 1
            spare ^= not call.kept
        self._waiting, self._size = remaining, sum(call.size for call in remaining)

    def end(self, call: HookCall, hurry_at: float) -> None:
        """Put the last call; from `hurry_at` on, the calls before it that may be left out are left out."""
        self._hurry_at = hurry_at
        self.put(call)

    def wait(self, deadline: float, patience: float) -> None:
        """Wait for the last call, until `deadline`; say what was left out."""
        if self._thread.ident is not None:
            self._thread.join(max(0.0, deadline - self._clock()))
        with self._changed:
            lost, self._gone = not self._gone and self._thread.is_alive(), True
            self._left_out.update(call.method for call in self._waiting if lost and not call.kept)
        if lost:
            self._thread.given_up = True
            log.warning(
                "tracker did not come to its end within trackers.end_seconds, and is left out",
                tracker=self._name,
                end_seconds=patience,
                call=self._present,
            )
        if self._left_out:
            lacks = ", ".join(
                f"{count} of {count + self._made[method]} {NOUNS[method]}" for method, count in self._left_out.items()
            )
            log.warning(
                "calls were left out for a tracker that is slower than the run", tracker=self._name, lacks=lacks
            )

    def _follow(self) -> None:
        while (call := self._next()) is not None:
            self._present = call.method
            self._made[call.method] += 1
            try:
                call.make(self._hooks)
            except BaseException as error:  # whatever it is, it is no reason to end a run
                self._leave(call.method, error)
                return
            if call.method == "on_end":
                return

    def _next(self) -> HookCall | None:
        """Wait for the next call; None if the tracker is no longer waited for."""
        with self._changed:
            while not self._gone:
                if not self._waiting:
                    self._changed.wait()
                    continue
                call = self._waiting.popleft()
                self._size -= call.size
                if call.kept or self._hurry_at is None or self._clock() < self._hurry_at:
                    return call
                self._left_out[call.method] += 1
        return None

    def _leave(self, method: str, error: BaseException) -> None:
        with self._changed:
            if self._gone:
                return
            self._gone = True
            self._waiting.clear()
        log.warning(
            "tracker failed and is left out; the run is not affected",
            tracker=self._name,
            call=method,
            error=exception_with_place(error),
        )
