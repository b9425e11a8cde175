"""The scheduler as a definition: it looks at every idle client for each job. The real one must choose the same clients.

Each selection is written as one pass over the candidates, the cap as a filter, and the rests as a search. So a choice
takes time in proportion to the number of clients, and a run takes quadratic time.
"""

from __future__ import annotations

import bisect
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from fedqueue.config.schema import Config
from fedqueue.protocol.keys import job_name
from fedqueue_coordinator.core.backoff import Backoff
from fedqueue_coordinator.core.events import Dispatch
from fedqueue_coordinator.core.fedcompass import FedCompass
from fedqueue_coordinator.core.reasons import AbandonReason, LapseCause, RejectionReason
from fedqueue_coordinator.core.run_counters import RunCounters
from fedqueue_coordinator.core.selection import draw
from fedqueue_coordinator.core.sync_round import SyncRound


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


class FairShare:
    """Applies the configured selection and the cap.

    `run_counters` belongs to the federation and counts committed updates; this object counts updates under way.
    """

    def __init__(self, config: Config, run_counters: RunCounters) -> None:
        self.last_job: dict[str, int] = {}
        """Client → the number of its last job."""
        self._seed = config.seed
        self._window = config.dispatch.share_window
        self._select = SELECTIONS[config.dispatch.selection]
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


def fastest(clients: Sequence[str], step_seconds: Mapping[str, float]) -> str:
    """Return the fastest client by its seconds per step; clients of unknown speed come before all others."""
    return min(clients, key=lambda client: (step_seconds.get(client, 0.0), client))


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


class ScanningBackoff(Backoff):
    """Answers each query from the counts and the heap of rests."""

    def set_aside(self, client: str) -> bool:
        """Whether the client gets no further job in this run."""
        failed = self.failures.get(client, 0) >= self.max_failures
        return failed or self.rejections.get(client, 0) >= self.max_rejections

    def allows(self, client: str) -> bool:
        """Whether the client neither rests nor is set aside."""
        return not self.set_aside(client) and all(client != resting for _, resting in self.resting)


class QuadraticScheduler:
    """Owns the slots of a federation. Times are seconds of the run's clock."""

    def __init__(self, config: Config, run_counters: RunCounters, epoch: int, job_number: int, started: bool) -> None:
        """`job_number` is the number of the last job. Job names of different epochs differ."""
        self.clients: dict[str, int] = {}
        """Alive clients, with the number of examples each registered."""
        self.registered: dict[str, int] = {}
        """As `clients`, and also clients that left, whose late updates must be checked."""
        self.open_jobs: dict[str, str] = {}
        """Job → client."""
        self.job_number = job_number
        self._config = config
        self._run_counters = run_counters
        self._epoch = epoch
        self._version = max(run_counters.last_merged.values(), default=0)
        self._started = started
        limits = config.dispatch
        self._backoff = ScanningBackoff(
            limits.backoff_seconds, limits.max_client_failures, config.admission.max_rejections
        )
        self._fair_share = FairShare(config, run_counters)
        self._round = SyncRound(config)  # stays empty without a barrier
        fedcompass = config.dispatch.schedule == "fedcompass"
        self._fedcompass = FedCompass(config.dispatch.fedcompass, run_counters.step_seconds) if fedcompass else None
        self._idle = IdlePool()
        self._busy: Counter[str] = Counter()  # client → open jobs; more than one only after a recovery

    # Recovery

    def restore_jobs(
        self, open_jobs: Mapping[str, str], registered: Mapping[str, int], last_jobs: Mapping[str, int]
    ) -> None:
        """Restore open jobs (→ client), registrations, and each client's last job number."""
        self.open_jobs.update(open_jobs)
        self._busy.update(open_jobs.values())
        self.registered.update(registered)
        self._fair_share.last_job.update(last_jobs)
        if self._config.barrier:
            for client in open_jobs.values():
                self._round.add(client, self._run_counters.seconds)  # the round began with the newest version

    def restore_rests(self, ends: Mapping[str, float]) -> None:
        """Restore rests: client → end of its rest."""
        for client, end in ends.items():
            self._backoff.rest(client, end)

    # Clients

    def join(self, client: str, examples: int) -> None:
        """Add a client that registered with `examples` examples."""
        self.clients[client] = examples
        self.registered[client] = examples
        self.offer(client)

    def leave(self, client: str) -> None:
        """Remove a client; its open jobs stay open."""
        self.clients.pop(client, None)
        self._idle.discard(client)

    def offer(self, client: str) -> None:
        """Make the client idle if it may train: it is alive, has no job, no rest, no round and no group to wait for."""
        in_group = self._fedcompass is not None and self._fedcompass.waits(client)
        taken = self._busy[client] > 0 or client in self._round or in_group
        if client in self.clients and not taken and self._backoff.allows(client):
            self._idle.add(client)

    def end_rests(self, now: float) -> None:
        """Make the clients idle whose rest is over."""
        for client in self._backoff.rested(now):
            self.offer(client)

    @property
    def started(self) -> bool:
        """Whether enough clients were alive at some time, so that jobs may be dispatched."""
        return self._started

    def is_set_aside(self, client: str) -> bool:
        """Whether the client gets no further job in this run."""
        return self._backoff.set_aside(client)

    @property
    def declining(self) -> frozenset[str]:
        """No client of this oracle has a budget."""
        return frozenset()

    @property
    def all_set_aside(self) -> bool:
        """Whether every client that ever registered is set aside, so that no job can be dispatched again."""
        return bool(self.registered) and all(map(self._backoff.set_aside, self.registered))

    # Updates

    def arrived(self, job: str, client: str, now: float) -> bool:
        """Free the slot of a job whose update arrived; return whether that update makes a version alone."""
        self._free(job, client)
        self._fair_share.arrived(client)
        alone = self._fedcompass.arrived(client, now) if self._fedcompass else False
        self.offer(client)
        return alone

    def merged(self, client: str) -> None:
        """Reset the client's failures, as its update is merged."""
        self._backoff.succeeded(client)
        self.offer(client)  # the rejection of an earlier update may have set it aside in the meantime

    def rejected(self, client: str, reason: RejectionReason, quarantine_seconds: float, now: float) -> None:
        """Apply the penalty for an update that is not merged. Another job of the client stays as it is."""
        self._fair_share.rejected(client)
        if not self._busy[client]:
            self._leave_group(client)
        self._backoff.penalize_rejection(client, reason, quarantine_seconds, now)
        self._idle.discard(client)
        self.offer(client)

    def committed(self, version: int, clients: Sequence[str], now: float) -> None:
        """Count a version that consists of one update of each of `clients`."""
        self._version = version
        self._fair_share.committed(version, clients, now)

    def take_measured(self) -> dict[str, float]:
        """Return the speeds that were measured since the last call: client → seconds per local step."""
        return self._fedcompass.take_measured() if self._fedcompass else {}

    def share(self, client: str) -> float:
        """Return the client's share, from 0 to 1, of the updates in recent versions."""
        return self._fair_share.share(client)

    # Jobs that end without an update

    def lost(self, job: str, client: str) -> None:
        """Free the slot of a job that ended; neither a round nor a group waits for the client any longer."""
        self._leave_group(client)
        self._free(job, client)

    def penalize_ending(self, client: str, reason: AbandonReason, now: float) -> None:
        """Apply the penalty for a job that its worker ended."""
        self._backoff.penalize_ending(client, reason, now)

    def penalize_lapse(self, client: str, cause: LapseCause, now: float) -> None:
        """Apply the penalty for a job whose lease expired."""
        self._backoff.penalize_lapse(client, cause, now)

    def jobs_of(self, client: str) -> list[str]:
        """Return the client's open jobs, oldest first."""
        return [job for job, of in self.open_jobs.items() if of == client]

    def close_all(self) -> list[tuple[str, str]]:
        """Close every open job, as the run ends; return the jobs and their clients."""
        jobs = sorted(self.open_jobs.items())
        self.open_jobs.clear()
        return jobs

    # Rounds and groups

    @property
    def forms_groups(self) -> bool:
        """Whether clients are scheduled in groups that arrive together (FedCompass)."""
        return self._fedcompass is not None

    def round_is_over(self, now: float) -> bool:
        """Whether the round's deadline has passed, or no client can join the round."""
        can_grow = self.open_jobs or self._idle or self._backoff.resting
        return self._round.is_over(now) or not can_grow

    def close_round(self) -> list[tuple[str, str]]:
        """Begin the next round: every client may train for it. Returns the jobs and clients that are late."""
        late = sorted(self.open_jobs.items())
        for job, client in late:
            self._free(job, client)
        self._round.close()
        for client in self.clients:
            self.offer(client)
        return late

    def close_groups(self, now: float) -> list[str]:
        """Close groups that are complete or past their deadline; return their clients that arrived."""
        return self._fedcompass.close_groups(now) if self._fedcompass else []

    def next_deadline(self, buffered: bool) -> float | None:
        """Time at which a rest, a round or a group ends, or None. A round only ends by time with updates `buffered`."""
        ends = [
            self._backoff.next_end(),
            self._round.deadline if buffered else None,
            self._fedcompass.next_deadline() if self._fedcompass else None,
        ]
        return min((end for end in ends if end is not None), default=None)

    # Dispatch

    def dispatch(self, arriving: int, buffered: int, now: float, backlog: int = 0) -> list[Dispatch]:
        """Give jobs to idle clients while slots are free.

        `arriving` updates are being read and `buffered` ones wait for the next version. No update waits for a keeper.
        """
        assert backlog == 0
        self._started = self._started or len(self.clients) >= self._config.minimum_clients
        dispatched: list[Dispatch] = []
        while self._started and self._idle and self._has_room(arriving + buffered):
            client = self._choose(self.job_number + 1, nothing_under_way=not (self.open_jobs or arriving))
            if client is None:  # every idle client has reached its share
                break
            self.job_number += 1
            self._idle.discard(client)
            self._busy[client] += 1
            self._fair_share.last_job[client] = self.job_number
            if self._config.barrier:
                self._round.add(client, now)
            steps = self._fedcompass.assign(client, now) if self._fedcompass else 0
            job = job_name(self._config.name, self._epoch, self.job_number, client)
            self.open_jobs[job] = client
            dispatched.append(Dispatch(job, self.job_number, client, steps))
        return dispatched

    def _has_room(self, without_slot: int) -> bool:
        if self._config.barrier:
            return self._round.has_room(len(self.open_jobs) + without_slot)
        return len(self.open_jobs) < self._config.concurrency

    def _choose(self, number: int, nothing_under_way: bool) -> str | None:
        candidates = self._fair_share.within_share(self._idle.clients, self._busy, nothing_under_way)
        if not candidates:
            return None
        if self._fedcompass:
            return fastest(candidates, self._run_counters.step_seconds)
        return self._fair_share.choose(candidates, number, self._version, self.registered)

    def _free(self, job: str, client: str) -> None:
        if self.open_jobs.pop(job, None) is not None:
            self._busy[client] -= 1

    def _leave_group(self, client: str) -> None:
        self._round.drop(client)
        if self._fedcompass:
            self._fedcompass.lost(client)
