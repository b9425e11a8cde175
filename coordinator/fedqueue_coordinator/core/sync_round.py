"""The round behind a barrier: its clients, and when it closes (Bonawitz et al., arXiv 1902.01046, §2).

A round selects ⌈`over_selection` · C⌉ clients and closes when C updates are merged. At its deadline it closes with
the updates that arrived; if no update arrived, it closes with the first one. Jobs still running at that point are
late: they are taken back, the ledger records it, and their clients may train for the next version at once.
"""

from __future__ import annotations

from fedqueue.config.schema import Config


class SyncRound:
    """The clients that are selected for the coming version, and the time since when."""

    def __init__(self, config: Config) -> None:
        self._size = config.concurrency
        self._seconds = config.dispatch.round_deadline_seconds
        self._began: float | None = None
        self.clients: set[str] = set()

    def __contains__(self, client: str) -> bool:
        return client in self.clients

    def has_room(self, members: int) -> bool:
        """Whether the round selects one more client, if `members` jobs train, arrive or are buffered."""
        return members < self._size

    def add(self, client: str, now: float) -> None:
        """Add a selected client; the first one begins the round."""
        self.clients.add(client)
        if self._began is None:
            self._began = now

    def drop(self, client: str) -> None:
        """Remove a client whose job ended without a merge."""
        self.clients.discard(client)

    def close(self) -> None:
        """End the round: its version is made."""
        self.clients.clear()
        self._began = None

    @property
    def deadline(self) -> float | None:
        """Time at which the round closes with the updates that arrived; None without a limit."""
        return self._began + self._seconds if self._seconds and self._began is not None else None

    def is_over(self, now: float) -> bool:
        """Whether the deadline has passed."""
        return self.deadline is not None and now >= self.deadline
