"""Turns the ledger's records, in their order, into calls of hooks."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from fedqueue_coordinator.tracking.hooks import RunHooks, RunProgress, RunStart

MOST_VERSIONS = 100_000
"""Versions whose number of updates is known to an evaluation that ends later."""


@dataclass(frozen=True)
class HookCall:
    """A call of one method of `RunHooks`."""

    method: str
    arguments: tuple[Any, ...]
    progress: RunProgress
    kept: bool = False
    """Whether the call is made for hooks that are slower than the run, too."""
    size: int = 1
    """How much memory the call holds while it waits: the updates that its record describes, and one."""

    def make(self, hooks: RunHooks) -> None:
        """Call the method of `hooks`."""
        hooks.progress = self.progress
        getattr(hooks, self.method)(*self.arguments)


class Narrator:
    """Tells a run's story: knows how far the run is, and which call follows from each record."""

    def __init__(self) -> None:
        self.progress = RunProgress()
        self._first = 0  # the version of the first element of `_updates`
        self._updates: deque[int] = deque([0], maxlen=MOST_VERSIONS)

    def resume(self, version: int, updates: int, seconds: float) -> None:
        """Continue at this version, without a call for what was before it."""
        self.progress = replace(self.progress, version=version, updates=updates, seconds=seconds)
        self._first, self._updates = version, deque([updates], maxlen=MOST_VERSIONS)

    def start(self, run: RunStart) -> HookCall:
        """The call that begins the story."""
        return HookCall("on_start", (run,), self.progress, kept=True)

    def end(self, summary: Mapping[str, Any]) -> HookCall:
        """The call that ends the story."""
        seconds = max(self.progress.seconds, summary["seconds"])
        return HookCall("on_end", (summary,), replace(self.progress, seconds=seconds), kept=True)

    def tell(self, record: Mapping[str, Any]) -> HookCall | None:
        """The call that follows from the ledger's next record, if any does."""
        kind, before = record["kind"], self.progress
        if kind == "version":
            updates = before.updates + len(record["merged"])
            self.progress = replace(before, version=record["version"], updates=updates, seconds=record["seconds"])
            self._first += len(self._updates) == MOST_VERSIONS
            self._updates.append(updates)
            return HookCall("on_version", (record,), self.progress, size=1 + len(record["merged"]))
        if kind == "evaluation":
            self.progress = replace(before, seconds=max(before.seconds, record["seconds"]))
            return None if record.get("error") else self._evaluation(record)
        if kind == "rejected":
            counts = {**before.rejected, record["reason"]: before.rejected.get(record["reason"], 0) + 1}
            self.progress = replace(before, seconds=max(before.seconds, record["seconds"]), rejected=counts)
            return HookCall("on_rejection", (record,), self.progress)
        if kind in ("abandoned", "unavailable"):
            self.progress = replace(before, seconds=max(before.seconds, record["seconds"]))
            return HookCall("on_client", (record,), self.progress)
        return None

    def _evaluation(self, record: Mapping[str, Any]) -> HookCall:
        version = record["version"]
        updates = self._updates[min(max(version - self._first, 0), len(self._updates) - 1)]
        then = replace(self.progress, version=version, updates=updates)
        return HookCall("on_evaluation", (version, record["metrics"]), then, kept=True)
