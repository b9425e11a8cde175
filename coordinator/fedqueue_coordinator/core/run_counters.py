"""Counters restored on recovery: from the commit of a version, or by replaying the ledger."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self


@dataclass
class RunCounters:
    """Counts of merged updates, and what the scheduler learned about the clients."""

    updates: int = 0
    """Merged updates."""
    seconds: float = 0.0
    """Time at which the newest version was made, on the run's clock."""
    started: float | None = None
    """Time at which the clients could begin to train, on the run's clock; None before."""
    step_seconds: dict[str, float] = field(default_factory=dict)
    """Client → seconds per local step, if the schedule measures them."""
    merged_by: dict[str, int] = field(default_factory=dict)
    """Client → its merged updates."""
    last_merged: dict[str, int] = field(default_factory=dict)
    """Client → the newest version with an update of it."""
    recent: list[list[str]] = field(default_factory=list)
    """The clients of the last `dispatch.share_window` versions: a list for each version, the newest last."""
    accounts: dict[str, int] = field(default_factory=dict)
    """With [privacy.clients], client → Σ ℓ² over its loads ℓ, the sums of its updates' integer weights in a cohort."""
    charged: set[str] = field(default_factory=set)
    """The digests of the cohorts for the coming version whose loads are in the accounts."""

    @classmethod
    def from_ledger(cls, committed: Mapping[str, Any], ledger: Iterable[Mapping[str, Any]], window: int) -> Self:
        """Restore the counters of the last version in `ledger`, with which `committed` was stored."""
        counters = cls(**committed)
        for record in ledger:
            if record["kind"] == "spend":
                counters.charge(record["cohort"], record["loads"])
            elif record["kind"] == "version":
                counters.step_seconds.update(record.get("step_seconds", {}))
                counters._count(record["version"], [line["client"] for line in record["merged"]], window)
        return counters

    def charge(self, cohort: str, loads: Mapping[str, int]) -> None:
        """Add the loads of a cohort, which is named by its digest, to the accounts."""
        for client, load in loads.items():
            self.accounts[client] = self.accounts.get(client, 0) + load**2
        self.charged.add(cohort)

    def committed(self) -> dict[str, Any]:
        """Return the counters that are stored with a version: those that the ledger does not contain."""
        return {
            "updates": self.updates,
            "seconds": self.seconds,
            "started": self.started,
        }

    def commit(self, version: int, clients: Sequence[str], window: int, now: float) -> None:
        """Count a new version of one update of each of `clients`; a client may occur twice."""
        self.updates += len(clients)
        self.seconds = now
        self._count(version, clients, window)

    def _count(self, version: int, clients: Sequence[str], window: int) -> None:
        for client in clients:
            self.merged_by[client] = self.merged_by.get(client, 0) + 1
            self.last_merged[client] = version
        self.charged.clear()
        self.recent.append(list(clients))
        del self.recent[:-window]
