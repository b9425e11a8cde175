"""Which client may be to blame for the cohorts whose sum was too long: statistics, and no proof.

A masked sum that is longer than those of clipped updates tells that a member or a keeper was not honest, and not which.
A client that was in at least 3 of the last 4 such cohorts is suspected, until it is in a cohort whose sum is right.
Where that is true of all members, as behind a keeper that lies, it tells nothing: then no client is suspected.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable

WINDOW, ENOUGH = 4, 3


class FailedCohorts:
    """The clients of the last cohorts that failed, without those that have been in a good cohort since."""

    def __init__(self, first_seconds: float) -> None:
        """`first_seconds`: how long a client rests that is suspected for the first time; the next rests double."""
        self._first_seconds = first_seconds
        self._failed: deque[frozenset[str]] = deque(maxlen=WINDOW)
        self._rests: Counter[str] = Counter()

    def succeeded(self, clients: Iterable[str]) -> None:
        """Note a cohort whose sum is right: each of its members was honest."""
        honest = frozenset(clients)
        self._failed = deque((failed - honest for failed in self._failed), WINDOW)
        for client in honest:
            self._rests.pop(client, None)

    def failed(self, clients: Iterable[str]) -> dict[str, float]:
        """Note a cohort whose sum is too long; returns the suspected members, with the seconds that each shall rest."""
        members = frozenset(clients)
        self._failed.append(members)
        suspects = {client for client in members if sum(client in failed for failed in self._failed) >= ENOUGH}
        if suspects == members:
            return {}
        rests = {client: self._first_seconds * 2 ** self._rests[client] for client in sorted(suspects)}
        self._rests.update(rests.keys())
        return rests
