"""Remembers when the lease of each client can end at the earliest, so that no check reads the leases of all clients."""

from __future__ import annotations

import heapq


class LeaseWatch:
    """Clients with the time of their next check. Each operation takes O(log n) time for n clients."""

    def __init__(self) -> None:
        self._checks: dict[str, float] = {}
        self._heap: list[tuple[float, str]] = []  # contains earlier checks too, until their time

    def set(self, client: str, at: float) -> None:
        """Check the client at the time `at`, and not before."""
        self._checks[client] = at
        heapq.heappush(self._heap, (at, client))

    def discard(self, client: str) -> None:
        """Check the client no longer."""
        self._checks.pop(client, None)

    def due(self, now: float, most: int) -> list[str]:
        """Remove and return the clients whose check is due, at most `most`; those first that have waited longest."""
        clients: list[str] = []
        while len(clients) < most and self._heap and self._heap[0][0] <= now:
            at, client = heapq.heappop(self._heap)
            if self._checks.get(client) == at:
                del self._checks[client]
                clients.append(client)
        return clients
