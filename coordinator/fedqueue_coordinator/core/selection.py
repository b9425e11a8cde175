"""Selects the client of the next job, subject to a cap on each client's share of recent versions.

A selection ranks the idle clients and weighs them. The candidates are the clients of the lowest rank; one of them is
chosen with a probability in proportion to its weight, or the first by name. The selections are registered under the
values of `dispatch.selection`. A choice depends on the seed, on the job's number and on what is committed or stored. It
depends neither on a random generator's state nor on the order of past events, so a coordinator that resumes the run
chooses the same client.

The cap is on merged updates: no W = `dispatch.share_window` versions in a row contain more than ⌊`max_share` · W · K⌋
updates of one client, where K is the number of updates per version. It is applied at dispatch, by counting the client's
updates in the last W − 1 versions, in the buffer and under way. If no other client could train, the cap is exceeded: a
version with an unfair share is better than no version.

No choice looks at every idle client. They are kept in order (`idle_pool.py`), and a client moves when something that
its place depends on changes.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from fedqueue.config.schema import Config
from fedqueue.errors import ConfigurationError
from fedqueue_coordinator.core.run_counters import RunCounters

COMING_VERSION = 2**63  # as the number of a client's last version: later than every version that is made


@dataclass(frozen=True)
class ClientStats:
    """What a selection may depend on. A client without an entry in a map has no such number yet."""

    examples: Mapping[str, int | None]
    """Client → registered examples, None if their number is unknown."""
    last_merged: Callable[[str], int]
    """Client → the newest version with an update of it, or COMING_VERSION; −1 if there is no such version."""
    last_job: Mapping[str, int]
    """Client → the number of its last job."""

    def count(self, client: str) -> int:
        """Return the client's number of examples; for an unknown one the mean of the known ones, at least 1."""
        count = self.examples.get(client, 0)
        if count is not None:
            return count
        known = [other for other in self.examples.values() if other is not None]
        return max(1, round(sum(known) / len(known))) if known else 1


@dataclass(frozen=True)
class Selection:
    """A rule for the next client."""

    rank: Callable[[str, ClientStats], float] = lambda client, stats: 0
    """Only the clients of the lowest rank are candidates."""
    weight: Callable[[str, ClientStats], int] = lambda client, stats: 1
    """The candidates' probabilities are in proportion to it. If all are 0, the last candidate by name is selected."""
    draws: bool = True
    """Whether chance chooses among the candidates; otherwise the first by name is selected."""


SELECTIONS = {
    # Each client with the same probability.
    "uniform": Selection(),
    # The client with the oldest last job; clients without a job come first, by name.
    "round_robin": Selection(rank=lambda client, stats: stats.last_job.get(client, 0), draws=False),
    # The client whose last merged update is in the oldest version; among equals, as `uniform`.
    "stalest": Selection(rank=lambda client, stats: stats.last_merged(client)),
    # With a probability proportional to the number of examples (Li et al., arXiv 1907.02189, scheme I).
    "examples": Selection(weight=lambda client, stats: stats.count(client)),
}


def make_selection(name: str) -> Selection:
    """Return the selection with this name; raises ConfigurationError that lists the known names."""
    if name not in SELECTIONS:
        raise ConfigurationError("dispatch.selection", name, "unknown selection", f"known: {', '.join(SELECTIONS)}")
    return SELECTIONS[name]


def draw(seed: int, number: int) -> float:
    """Return the number in [0, 1) of job `number`: a hash, so that no generator's state must be saved."""
    digest = hashlib.blake2b(f"{seed}:{number}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53


class FairShare:
    """Counts what the selection and the cap depend on.

    `run_counters` belongs to the federation and counts committed updates; this object counts updates under way.
    """

    def __init__(self, config: Config, run_counters: RunCounters) -> None:
        self.last_job: dict[str, int] = {}
        """Client → the number of its last job."""
        self._window = config.dispatch.share_window
        self._limit = math.inf if config.updates_within_share is None else config.updates_within_share
        self._run_counters = run_counters
        self._counts: Counter[str] = Counter()  # client → updates in the versions of the window
        for clients in run_counters.recent[-self._window :]:
            self._counts.update(clients)
        self._updates = self._counts.total()
        self._leaving = self._oldest_version()  # client → updates that the coming version moves out of the window
        self._pending: Counter[str] = Counter()  # client → updates that arrived and are neither merged nor rejected

    def arrived(self, client: str) -> None:
        """Count an update of the client as pending."""
        self._pending[client] += 1

    def rejected(self, client: str) -> None:
        """Count an update of the client as pending no longer: it is not merged."""
        self._pending[client] -= 1

    def committed(self, version: int, clients: Sequence[str], now: float) -> set[str]:
        """Count a version that consists of one update of each of `clients`; `run_counters` counts it too.

        Returns the clients whose numbers have changed.
        """
        gone = self._leaving
        self._counts.subtract(gone)
        self._counts.update(clients)
        self._updates += len(clients) - gone.total()
        self._pending.subtract(clients)
        self._run_counters.commit(version, clients, self._window, now)
        self._leaving = self._oldest_version()
        return {*clients, *gone, *self._leaving}

    def _oldest_version(self) -> Counter[str]:
        recent = self._run_counters.recent
        return Counter(recent[-self._window] if len(recent) >= self._window else ())

    def share(self, client: str) -> float:
        """Return the client's share, from 0 to 1, of the updates in the last `share_window` versions."""
        return self._counts[client] / self._updates if self._updates else 0.0

    def last_merged(self, client: str) -> int:
        """Return `ClientStats.last_merged` of the client."""
        return COMING_VERSION if self._pending[client] > 0 else self._run_counters.last_merged.get(client, -1)

    def beyond_the_cap(self, client: str, busy: int) -> int:
        """Return 0 for a client that is below the cap, and otherwise its number of updates.

        That is the number in the window that ends with the coming version, as far as they arrived, and of its `busy`
        open jobs.
        """
        if self._limit == math.inf:
            return 0
        updates = self._counts[client] - self._leaving[client] + self._pending[client] + busy
        return updates if updates >= self._limit else 0
