"""The round behind a barrier: whom it has asked, and when it closes (Bonawitz et al., arXiv 1902.01046, §2).

A round asks ⌈`over_selection` · C⌉ clients and closes when C of them are merged. At its deadline it closes with those
that came, and where nobody has, with the first one who comes. Who is then still training is late: the job is taken
back, which its ledger record says, and the client may train for the next version at once.
"""

from __future__ import annotations

from fedqueue.config.loading import Config


class SyncRound:
    """Clients asked for the coming version, and since when."""

    def __init__(self, config: Config) -> None:
        self._asked = config.concurrency
        self._seconds = config.dispatch.deadline_seconds
        self._began: float | None = None
        self.clients: set[str] = set()

    def __contains__(self, client: str) -> bool:
        return client in self.clients

    def has_room(self, members: int) -> bool:
        """Whether the round asks one more, where `members` train, are on their way, or are buffered."""
        return members < self._asked

    def ask(self, client: str, now: float) -> None:
        self.clients.add(client)
        if self._began is None:
            self._began = now

    def drop(self, client: str) -> None:
        self.clients.discard(client)

    def close(self) -> None:
        self.clients.clear()
        self._began = None

    @property
    def deadline(self) -> float | None:
        """When the round closes with those that have come; None without a limit."""
        return self._began + self._seconds if self._seconds and self._began is not None else None

    def is_over(self, now: float) -> bool:
        return self.deadline is not None and now >= self.deadline
