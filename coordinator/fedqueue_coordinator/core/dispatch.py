"""Who could train next: the clients that are alive and idle, those that must rest, and what a job's order says."""

from __future__ import annotations

import bisect
import heapq
from dataclasses import dataclass, field

from fedqueue.config.loading import Config
from fedqueue.protocol.messages import Order
from fedqueue_coordinator.core.events import Dispatch


def make_order(config: Config, dispatch: Dispatch) -> Order:
    """What the client's worker is told; the seed differs from job to job and from run to run."""
    steps = {"steps": dispatch.steps} if dispatch.steps else {}
    return Order(
        run=config.name,
        job=dispatch.job,
        client=dispatch.client,
        seed=(config.seed * 1_000_003 + dispatch.number) % 2**53,
        training=config.training.model_copy(update=steps),
    )


@dataclass
class IdlePool:
    """Idle clients, sorted: a choice among them does not depend on how they came to be idle."""

    clients: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.clients)

    def __contains__(self, client: str) -> bool:
        place = bisect.bisect_left(self.clients, client)
        return place < len(self.clients) and self.clients[place] == client

    def add(self, client: str) -> None:
        if client not in self:
            bisect.insort(self.clients, client)

    def discard(self, client: str) -> None:
        if client in self:
            del self.clients[bisect.bisect_left(self.clients, client)]


@dataclass
class Backoff:
    """Clients whose task raised: each rests, twice as long after each further failure, and is then set aside.

    Those whose updates are rejected likewise, with a count of its own.
    """

    first_seconds: float
    max_failures: int
    max_rejections: int = 5
    failures: dict[str, int] = field(default_factory=dict)
    """Failures in a row."""
    rejections: dict[str, int] = field(default_factory=dict)
    """Rejected updates in a row."""
    resting: list[tuple[float, str]] = field(default_factory=list)
    """Heap of (end of the rest, client)."""

    def failed(self, client: str, now: float) -> None:
        """Count a failure: the client rests, or is set aside."""
        self._count(self.failures, client, now)

    def rejected(self, client: str, now: float) -> None:
        """Count a rejected update: the client rests, or is set aside."""
        self._count(self.rejections, client, now)

    def pause(self, client: str, now: float) -> None:
        """The client rests once; nothing is counted against it."""
        if not self.set_aside(client):
            self.rest(client, now + self.first_seconds)

    def rest(self, client: str, end: float) -> None:
        """The client gets no job before `end`."""
        heapq.heappush(self.resting, (end, client))

    def _count(self, counts: dict[str, int], client: str, now: float) -> None:
        counts[client] = counts.get(client, 0) + 1
        if not self.set_aside(client):
            self.rest(client, now + self.first_seconds * 2 ** (counts[client] - 1))

    def succeeded(self, client: str) -> None:
        self.failures.pop(client, None)
        self.rejections.pop(client, None)

    def set_aside(self, client: str) -> bool:
        failed = self.failures.get(client, 0) >= self.max_failures
        return failed or self.rejections.get(client, 0) >= self.max_rejections

    def allows(self, client: str) -> bool:
        return not self.set_aside(client) and all(client != resting for _, resting in self.resting)

    def rested(self, now: float) -> list[str]:
        """Clients whose rest is over; they are not resting any more."""
        clients = []
        while self.resting and self.resting[0][0] <= now:
            clients.append(heapq.heappop(self.resting)[1])
        return clients

    def next_end(self) -> float | None:
        return self.resting[0][0] if self.resting else None
