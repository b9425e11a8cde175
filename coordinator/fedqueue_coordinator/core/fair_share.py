"""Whose turn it is: the selection, and a cap on each client's share of the last versions.

The cap is on what is merged: no W = `dispatch.share_window` versions in a row hold more than ⌊`max_share` · W · K⌋
updates of one client, K being the updates per version. It is kept when a job is dispatched, by counting what the client
has in the last W − 1 versions, in the buffer and under way. Where nobody else could train, the cap gives way: it is for
fairness, and an unfair update is better than none.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

from fedqueue.config.loading import Config
from fedqueue_coordinator.core.run_counters import RunCounters
from fedqueue_coordinator.core.selection import ClientStats, draw, make_selection


class FairShare:
    """`totals` is the federation's own: what is committed is read there, what is not is counted here."""

    def __init__(self, config: Config, totals: RunCounters) -> None:
        self.last_job: dict[str, int] = {}
        """Client → the number of its last job."""
        self._seed, self._window = config.seed, config.dispatch.share_window
        self._select = make_selection(config.dispatch.selection)
        self._limit = config.updates_within_share if config.dispatch.max_share < 1 else math.inf
        self._totals = totals
        self._counts: Counter[str] = Counter()  # client → updates in the versions of the window
        for clients in totals.recent[-self._window :]:
            self._counts.update(clients)
        self._pending: Counter[str] = Counter()  # client → updates that arrived and are neither merged nor rejected

    def arrived(self, client: str) -> None:
        self._pending[client] += 1

    def rejected(self, client: str) -> None:
        self._pending[client] -= 1

    def committed(self, version: int, clients: Sequence[str], now: float) -> None:
        """A version of one update of each of `clients` is made: it goes into the totals."""
        full = len(self._totals.recent) >= self._window
        self._counts.subtract(self._totals.recent[-self._window] if full else ())
        self._counts.update(clients)
        self._pending.subtract(clients)
        self._totals.commit(version, clients, self._window, now)

    def share(self, client: str) -> float:
        """The client's share of the updates in the last `share_window` versions."""
        updates = sum(map(len, self._totals.recent))
        return self._counts[client] / updates if updates else 0.0

    def choose(self, candidates: Sequence[str], number: int, version: int, examples: Mapping[str, int]) -> str:
        """The client of job `number` among `candidates`, which are sorted; `version` is the newest one."""

        def last_merged(client: str) -> int:
            return version + 1 if self._pending[client] > 0 else self._totals.last_merged.get(client, -1)

        return self._select(candidates, ClientStats(examples, last_merged, self.last_job), draw(self._seed, number))

    def within_share(self, idle: Sequence[str], busy: Mapping[str, int], nothing_under_way: bool) -> Sequence[str]:
        """Those of `idle` (sorted) that the cap lets train; where it lets none and nothing is under way, the least."""
        if self._limit == math.inf or not idle:
            return idle
        ahead = {client: self._in_the_next_window(client) + busy.get(client, 0) for client in idle}
        within = [client for client in idle if ahead[client] < self._limit]
        if within or not nothing_under_way:
            return within
        least = min(ahead.values())
        return [client for client in idle if ahead[client] == least]

    def _in_the_next_window(self, client: str) -> int:
        """Its updates in the window that ends with the coming version, as far as they have arrived."""
        recent = self._totals.recent
        leaving = recent[0].count(client) if len(recent) >= self._window else 0
        return self._counts[client] - leaving + self._pending[client]
