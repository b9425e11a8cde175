"""The idle clients of a federation."""

from __future__ import annotations

import bisect
from dataclasses import dataclass, field


@dataclass
class IdlePool:
    """Idle clients, sorted by name, so that a choice among them does not depend on the order in which they came."""

    clients: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.clients)

    def __contains__(self, client: str) -> bool:
        index = bisect.bisect_left(self.clients, client)
        return index < len(self.clients) and self.clients[index] == client

    def add(self, client: str) -> None:
        """Insert the client, unless it is in the pool."""
        if client not in self:
            bisect.insort(self.clients, client)

    def discard(self, client: str) -> None:
        """Remove the client, if it is in the pool."""
        if client in self:
            del self.clients[bisect.bisect_left(self.clients, client)]
