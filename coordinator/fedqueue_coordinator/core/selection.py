"""Selects the client of the next job, subject to a cap on each client's share of recent versions.

The selections are pure functions, registered under the values of `dispatch.selection`. A choice depends on the seed, on
the job's number and on what is committed or stored. It depends neither on a random generator's state nor on the order
of past events, so a coordinator that resumes the run chooses the same client.

The cap is on merged updates: no W = `dispatch.share_window` versions in a row contain more than ⌊`max_share` · W · K⌋
updates of one client, where K is the number of updates per version. It is applied at dispatch, by counting the client's
updates in the last W − 1 versions, in the buffer and under way. If no other client could train, the cap is exceeded: a
version with an unfair share is better than no version.
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


@dataclass(frozen=True)
class ClientStats:
    """What a selection may depend on. A client without an entry in a map has no such number yet."""

    examples: Mapping[str, int]
    """Client → registered examples."""
    last_merged: Callable[[str], int]
    """Client → the newest version with an update of it, the coming version included; −1 if there is no such version."""
    last_job: Mapping[str, int]
    """Client → the number of its last job."""


Selection = Callable[[Sequence[str], ClientStats, float], str]
"""(candidates, sorted and not empty; their statistics; the job's own number in [0, 1)) → the selected client."""


def uniform(candidates: Sequence[str], stats: ClientStats, draw: float) -> str:
    """Select each candidate with the same probability."""
    return candidates[int(draw * len(candidates))]


def round_robin(candidates: Sequence[str], stats: ClientStats, draw: float) -> str:
    """Select the candidate with the oldest last job; candidates without a job come first, by name."""
    return min(candidates, key=lambda client: stats.last_job.get(client, 0))


def stalest(candidates: Sequence[str], stats: ClientStats, draw: float) -> str:
    """Select the candidate whose last merged update is in the oldest version; among equals, `uniform`."""
    oldest = min(map(stats.last_merged, candidates))
    return uniform([client for client in candidates if stats.last_merged(client) == oldest], stats, draw)


def by_examples(candidates: Sequence[str], stats: ClientStats, draw: float) -> str:
    """Select with a probability proportional to the number of examples (Li et al., arXiv 1907.02189, scheme I)."""
    weights = [stats.examples.get(client, 0) for client in candidates]
    position = draw * sum(weights)
    for client, weight in zip(candidates, weights, strict=True):
        position -= weight
        if position < 0:
            return client
    return candidates[-1]  # no candidate has an example, or the last difference was rounded


SELECTIONS: dict[str, Selection] = {
    "uniform": uniform,
    "round_robin": round_robin,
    "stalest": stalest,
    "examples": by_examples,
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
    """Applies the configured selection and the cap.

    `run_counters` belongs to the federation and counts committed updates; this object counts updates under way.
    """

    def __init__(self, config: Config, run_counters: RunCounters) -> None:
        self.last_job: dict[str, int] = {}
        """Client → the number of its last job."""
        self._seed = config.seed
        self._window = config.dispatch.share_window
        self._select = make_selection(config.dispatch.selection)
        self._limit = math.inf if config.updates_within_share is None else config.updates_within_share
        self._run_counters = run_counters
        self._counts: Counter[str] = Counter()  # client → updates in the versions of the window
        for clients in run_counters.recent[-self._window :]:
            self._counts.update(clients)
        self._pending: Counter[str] = Counter()  # client → updates that arrived and are neither merged nor rejected

    def arrived(self, client: str) -> None:
        """Count an update of the client as pending."""
        self._pending[client] += 1

    def rejected(self, client: str) -> None:
        """Count an update of the client as pending no longer: it is not merged."""
        self._pending[client] -= 1

    def committed(self, version: int, clients: Sequence[str], now: float) -> None:
        """Count a version that consists of one update of each of `clients`; `run_counters` counts it too."""
        full = len(self._run_counters.recent) >= self._window
        self._counts.subtract(self._run_counters.recent[-self._window] if full else ())
        self._counts.update(clients)
        self._pending.subtract(clients)
        self._run_counters.commit(version, clients, self._window, now)

    def share(self, client: str) -> float:
        """Return the client's share, from 0 to 1, of the updates in the last `share_window` versions."""
        updates = sum(map(len, self._run_counters.recent))
        return self._counts[client] / updates if updates else 0.0

    def choose(self, candidates: Sequence[str], number: int, version: int, examples: Mapping[str, int]) -> str:
        """Select the client of job `number` among `candidates`, which are sorted; `version` is the newest one."""

        def last_merged(client: str) -> int:
            return version + 1 if self._pending[client] > 0 else self._run_counters.last_merged.get(client, -1)

        return self._select(candidates, ClientStats(examples, last_merged, self.last_job), draw(self._seed, number))

    def within_share(self, idle: Sequence[str], busy: Mapping[str, int], nothing_under_way: bool) -> Sequence[str]:
        """Return the clients of `idle` (sorted) that are below the cap.

        If no client is below it and nothing is under way, return those with the fewest updates.
        """
        if self._limit == math.inf or not idle:
            return idle
        ahead = {client: self._in_the_next_window(client) + busy.get(client, 0) for client in idle}
        within = [client for client in idle if ahead[client] < self._limit]
        if within or not nothing_under_way:
            return within
        least = min(ahead.values())
        return [client for client in idle if ahead[client] == least]

    def _in_the_next_window(self, client: str) -> int:
        """Number of the client's updates in the window that ends with the coming version, as far as they arrived."""
        recent = self._run_counters.recent
        leaving = recent[0].count(client) if len(recent) >= self._window else 0
        return self._counts[client] - leaving + self._pending[client]
