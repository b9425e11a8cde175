"""Backoff and exclusion of the clients whose jobs end without a merge."""

from __future__ import annotations

import heapq
from collections import Counter
from dataclasses import dataclass, field

from fedqueue_coordinator.core.reasons import (
    FORGEABLE,
    FORGEABLE_ENDINGS,
    NO_FAULT,
    OUTLIER,
    WORKER_FAULT,
    AbandonReason,
    LapseCause,
    RejectionReason,
)


@dataclass
class Backoff:
    """Counts each client's consecutive failures and consecutive rejected updates.

    After each one the client rests, twice as long as the time before. At `max_failures` failures or `max_rejections`
    rejections in a row the client is set aside: it gets no further job. Times are seconds of the run's clock.
    """

    first_seconds: float
    """The first rest."""
    max_failures: int
    max_rejections: int = 5
    failures: dict[str, int] = field(default_factory=dict)
    """Client → failures in a row."""
    rejections: dict[str, int] = field(default_factory=dict)
    """Client → rejected updates in a row."""
    resting: list[tuple[float, str]] = field(default_factory=list)
    """Heap of (end of the rest, client)."""
    excluded: set[str] = field(default_factory=set)
    """The clients that are set aside."""
    declining: set[str] = field(default_factory=set)
    """Those of them that train no further job of this run, because a privacy budget is used up."""
    _rests: Counter[str] = field(default_factory=Counter)  # client → its entries in `resting`

    # Penalties

    def penalize_rejection(self, client: str, reason: RejectionReason, quarantine_seconds: float, now: float) -> None:
        """Apply backoff or exclusion for a rejected update.

        `quarantine_seconds`: what the outlier filter imposes, where it is the one that rejected the update.
        """
        if reason is RejectionReason.BUDGET:
            self.declined(client)
        elif reason in OUTLIER:
            if quarantine_seconds:
                self.rest(client, now + quarantine_seconds)
        elif reason in FORGEABLE:
            self.pause(client, now)
        elif reason not in NO_FAULT:
            self.rejected(client, now)

    def penalize_ending(self, client: str, reason: AbandonReason, now: float) -> None:
        """Apply backoff or exclusion for a job that ended without an update."""
        if reason in WORKER_FAULT:
            self.failed(client, now)
        elif reason in FORGEABLE_ENDINGS:
            self.pause(client, now)

    def declined(self, client: str) -> None:
        """Set the client aside: it trains no further job of this run."""
        self.excluded.add(client)
        self.declining.add(client)

    def penalize_lapse(self, client: str, cause: LapseCause, now: float) -> None:
        """Apply backoff or exclusion for a lapsed job: training that hangs counts as a failure of the task."""
        if cause is LapseCause.NO_PROGRESS:
            self.failed(client, now)

    def failed(self, client: str, now: float) -> None:
        """Count a failure: the client rests or is set aside."""
        self._count(self.failures, client, now)

    def rejected(self, client: str, now: float) -> None:
        """Count a rejected update: the client rests or is set aside."""
        self._count(self.rejections, client, now)

    def pause(self, client: str, now: float) -> None:
        """Let the client rest once, without a count."""
        if not self.set_aside(client):
            self.rest(client, now + self.first_seconds)

    def rest(self, client: str, end: float) -> None:
        """Give the client no job before `end`."""
        heapq.heappush(self.resting, (end, client))
        self._rests[client] += 1

    def succeeded(self, client: str) -> None:
        """Reset the client's counts: its update is merged."""
        self.failures.pop(client, None)
        self.rejections.pop(client, None)
        if client not in self.declining:
            self.excluded.discard(client)

    def _count(self, counts: dict[str, int], client: str, now: float) -> None:
        counts[client] = counts.get(client, 0) + 1
        failures, rejections = self.failures.get(client, 0), self.rejections.get(client, 0)
        if failures >= self.max_failures or rejections >= self.max_rejections:
            self.excluded.add(client)
        else:
            self.rest(client, now + self.first_seconds * 2 ** (counts[client] - 1))

    # Queries

    def set_aside(self, client: str) -> bool:
        """Whether the client gets no further job in this run."""
        return client in self.excluded

    def allows(self, client: str) -> bool:
        """Whether the client neither rests nor is set aside."""
        return client not in self._rests and client not in self.excluded

    def rested(self, now: float) -> list[str]:
        """Remove and return the clients whose rest is over."""
        clients = []
        while self.resting and self.resting[0][0] <= now:
            client = heapq.heappop(self.resting)[1]
            clients.append(client)
            self._rests[client] -= 1
            if not self._rests[client]:
                del self._rests[client]
        return clients

    def next_end(self) -> float | None:
        """End of the next rest, or None."""
        return self.resting[0][0] if self.resting else None
