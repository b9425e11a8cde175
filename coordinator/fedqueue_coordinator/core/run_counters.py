"""What a successor needs to go on counting and choosing: committed with each version, or counted anew in the ledger."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self


@dataclass
class RunCounters:
    """Plain numbers, names and lists."""

    updates: int = 0
    seconds: float = 0.0
    """When the newest version was made, on the run's clock."""
    step_seconds: dict[str, float] = field(default_factory=dict)
    """Client → seconds per local step, where the schedule learns them."""
    merged_by: dict[str, int] = field(default_factory=dict)
    """Client → its merged updates."""
    last_merged: dict[str, int] = field(default_factory=dict)
    """Client → the newest version that has an update of it."""
    recent: list[list[str]] = field(default_factory=list)
    """The clients of the last `dispatch.share_window` versions, a list for each version, the newest last."""

    @classmethod
    def from_ledger(cls, committed: Mapping[str, Any], ledger: Iterable[Mapping[str, Any]], window: int) -> Self:
        """As they were when `committed` was, at the last version in `ledger`."""
        totals = cls(**committed)
        for record in ledger:
            if record["kind"] == "version":
                totals._count(record["version"], [line["client"] for line in record["merged"]], window)
        return totals

    def committed(self) -> dict[str, Any]:
        """What is stored with a version, as msgpack. What the ledger tells anyway is not: it grows with the clients."""
        return {"updates": self.updates, "seconds": self.seconds, "step_seconds": dict(self.step_seconds)}

    def commit(self, version: int, clients: Sequence[str], window: int, now: float) -> None:
        """Count a new version, made of one update of each of `clients` (one twice counts twice)."""
        self.updates += len(clients)
        self.seconds = now
        self._count(version, clients, window)

    def _count(self, version: int, clients: Sequence[str], window: int) -> None:
        for client in clients:
            self.merged_by[client] = self.merged_by.get(client, 0) + 1
            self.last_merged[client] = version
        self.recent.append(list(clients))
        del self.recent[:-window]
