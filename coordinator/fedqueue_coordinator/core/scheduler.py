"""The scheduler: which clients are alive, which of them may train, and which one gets the next job.

A client becomes idle when it joins, when its update arrives and when its job ends; `dispatch` gives jobs to idle
clients while slots are free. Whether a client may become idle depends on its rests (`backoff.py`), on its round
(`sync_round.py`) or on its group (`fedcompass.py`). `selection.py` chooses among the idle clients.

No step looks at every client. An idle client has a place in `idle_pool.py`, and moves when a number that the place
depends on changes (`_place`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Mapping, Sequence, Set

from fedqueue.config.schema import Config
from fedqueue.protocol.keys import job_name
from fedqueue_coordinator.core.backoff import Backoff
from fedqueue_coordinator.core.events import Dispatch
from fedqueue_coordinator.core.fedcompass import FedCompass
from fedqueue_coordinator.core.idle_pool import IdlePool, Place
from fedqueue_coordinator.core.reasons import AbandonReason, LapseCause, RejectionReason
from fedqueue_coordinator.core.run_counters import RunCounters
from fedqueue_coordinator.core.selection import ClientStats, FairShare, draw, make_selection
from fedqueue_coordinator.core.sync_round import SyncRound


class Scheduler:
    """Owns the slots of a federation. Times are seconds of the run's clock."""

    def __init__(self, config: Config, run_counters: RunCounters, epoch: int, job_number: int, started: bool) -> None:
        """`job_number` is the number of the last job. Job names of different epochs differ."""
        self.clients: dict[str, int | None] = {}
        """Alive clients, with the number of examples each registered, None if it is unknown."""
        self.registered: dict[str, int | None] = {}
        """As `clients`, and also clients that left, whose late updates must be checked."""
        self.without_examples: set[str] = set()
        """Clients that take no part, because their workers reported no examples."""
        self.open_jobs: dict[str, str] = {}
        """Job → client."""
        self.job_number = job_number
        self._config = config
        self._run_counters = run_counters
        self._epoch = epoch
        self._started = started
        limits = config.dispatch
        self._backoff = Backoff(limits.backoff_seconds, limits.max_client_failures, config.admission.max_rejections)
        self._fair_share = FairShare(config, run_counters)
        self._round = SyncRound(config)  # stays empty without a barrier
        fedcompass = config.dispatch.schedule == "fedcompass"
        self._fedcompass = FedCompass(config.dispatch.fedcompass, run_counters.step_seconds) if fedcompass else None
        self._selection = self._fedcompass.selection if self._fedcompass else make_selection(config.dispatch.selection)
        self._stats = ClientStats(self.registered, self._fair_share.last_merged, self._fair_share.last_job)
        self._idle = IdlePool()
        self._held: set[str] = set()
        # Client → its open jobs, oldest first; more than one only after a recovery.
        self._jobs: defaultdict[str, dict[str, None]] = defaultdict(dict)

    # Recovery

    def restore_jobs(
        self, open_jobs: Mapping[str, str], registered: Mapping[str, int | None], last_jobs: Mapping[str, int]
    ) -> None:
        """Restore open jobs (→ client), registrations, and each client's last job number."""
        for job, client in open_jobs.items():
            self.open_jobs[job] = client
            self._jobs[client][job] = None
        self.registered.update(registered)
        self._fair_share.last_job.update(last_jobs)
        for client in {*open_jobs.values(), *registered, *last_jobs}:
            self._place(client)
        if self._config.barrier:
            for client in open_jobs.values():
                self._round.add(client, self._run_counters.seconds)  # the round began with the newest version

    def restore_rests(self, ends: Mapping[str, float]) -> None:
        """Restore rests: client → end of its rest."""
        for client, end in ends.items():
            self._backoff.rest(client, end)

    # Clients

    def join(self, client: str, examples: int | None) -> None:
        """Add a client that registered with `examples` examples."""
        self.clients[client] = examples
        self.registered[client] = examples
        self.without_examples.discard(client)
        self.offer(client)

    def leave(self, client: str) -> None:
        """Remove a client; its open jobs stay open."""
        self.clients.pop(client, None)
        self._idle.discard(client)

    def offer(self, client: str) -> None:
        """Make the client idle if it may train: it is alive, has no job, no rest, no round and no group to wait for."""
        in_group = self._fedcompass is not None and self._fedcompass.waits(client)
        taken = client in self._jobs or client in self._round or client in self._held or in_group
        if client in self.clients and not taken and self._backoff.allows(client):
            self._idle.put(client, self._place_of(client))
        else:
            self._place(client)

    def _place(self, client: str) -> None:
        """Move an idle client, after a change of a number that its place depends on."""
        if client in self._idle:
            self._idle.put(client, self._place_of(client))

    def _place_of(self, client: str) -> Place:
        return Place(
            self._fair_share.beyond_the_cap(client, len(self._jobs.get(client, ()))),
            self._selection.rank(client, self._stats),
            self._selection.weight(client, self._stats),
        )

    def end_rests(self, now: float) -> None:
        """Make the clients idle whose rest is over."""
        for client in self._backoff.rested(now):
            self.offer(client)

    @property
    def started(self) -> bool:
        """Whether enough clients were alive at some time, so that jobs may be dispatched."""
        return self._started

    @property
    def has_idle(self) -> bool:
        """Whether a client may get a job as soon as a slot is free."""
        return bool(self._idle)

    @property
    def next_rest(self) -> float | None:
        """End of the next rest, or None."""
        return self._backoff.next_end()

    def is_set_aside(self, client: str) -> bool:
        """Whether the client gets no further job in this run."""
        return self._backoff.set_aside(client)

    @property
    def all_set_aside(self) -> bool:
        """Whether every client that ever registered is set aside, so that no job can be dispatched again."""
        excluded = self._backoff.excluded
        return 0 < len(self.registered) <= len(excluded) and self.registered.keys() <= excluded

    @property
    def declining(self) -> Set[str]:
        """The clients whose sites train no further job of this run."""
        return self._backoff.declining

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
        if client not in self._jobs:
            self._leave_group(client)
        self._backoff.penalize_rejection(client, reason, quarantine_seconds, now)
        self._idle.discard(client)
        self.offer(client)

    def committed(self, version: int, clients: Sequence[str], now: float) -> None:
        """Count a version that consists of one update of each of `clients`."""
        for client in self._fair_share.committed(version, clients, now):
            self._place(client)

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
        self._place(client)

    @property
    def busy(self) -> Container[str]:
        """The clients with an open job; a view, which changes as jobs do."""
        return self._jobs.keys()

    def jobs_of(self, client: str) -> list[str]:
        """Return the client's open jobs, oldest first."""
        return list(self._jobs.get(client, ()))

    def penalize_ending(self, client: str, reason: AbandonReason, now: float) -> None:
        """Apply the penalty for a job that its worker ended."""
        self._backoff.penalize_ending(client, reason, now)

    def declined(self, client: str) -> None:
        """Give the client no further job: a privacy budget of it is used up."""
        self._backoff.declined(client)
        self._idle.discard(client)

    def penalize_lapse(self, client: str, cause: LapseCause, now: float) -> None:
        """Apply the penalty for a job whose lease expired."""
        self._backoff.penalize_lapse(client, cause, now)

    def close_all(self) -> list[tuple[str, str]]:
        """Close every open job, as the run ends; return the jobs and their clients."""
        jobs = sorted(self.open_jobs.items())
        self.open_jobs.clear()
        self._jobs.clear()
        return jobs

    # Clients whose updates wait

    def hold(self, client: str) -> None:
        """Give the client no further job until `release`."""
        self._held.add(client)
        self._idle.discard(client)

    def release(self, client: str) -> None:
        """Let a client train that was held."""
        self._held.discard(client)
        self.offer(client)

    @property
    def held(self) -> frozenset[str]:
        """The clients that get no job until `release`."""
        return frozenset(self._held)

    # Rounds and groups

    @property
    def forms_groups(self) -> bool:
        """Whether clients are scheduled in groups that arrive together (FedCompass)."""
        return self._fedcompass is not None

    def round_is_over(self, now: float) -> bool:
        """Whether the round's deadline has passed, or no client can join the round."""
        return self._round.is_over(now) or not self.can_train

    @property
    def can_train(self) -> bool:
        """Whether a client trains, or may train without an update being merged before."""
        return bool(self.open_jobs or self._idle or self._backoff.resting)

    def close_round(self) -> list[tuple[str, str]]:
        """Begin the next round: every client may train for it. Returns the jobs and clients that are late."""
        late = sorted(self.open_jobs.items())
        for job, client in late:
            self._free(job, client)
        freed = {*self._round.clients, *(client for _, client in late)}
        self._round.close()
        for client in freed:
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

    @property
    def minimum_clients(self) -> int:
        """Clients that must be alive before training starts; a cohort does not wait for those without examples."""
        config = self._config
        if config.clients.min_available:
            return config.minimum_clients
        return max(1, min(config.minimum_clients, config.clients.number - len(self.without_examples)))

    def dispatch(self, arriving: int, buffered: int, now: float, backlog: int = 0) -> list[Dispatch]:
        """Give jobs to idle clients while slots are free.

        `arriving` updates are being read and `buffered` ones wait for the next version. No job is given while more
        than `dispatch.concurrency` updates, the `backlog`, wait for a keeper.
        """
        self._started = self._started or len(self.clients) >= self.minimum_clients
        dispatched: list[Dispatch] = []
        room = backlog <= self._config.concurrency
        while room and self._started and self._idle and self._has_room(arriving + buffered):
            client = self._choose(self.job_number + 1, nothing_under_way=not (self.open_jobs or arriving))
            if client is None:  # every idle client has reached its share
                break
            self.job_number += 1
            self._idle.discard(client)
            self._fair_share.last_job[client] = self.job_number
            if self._config.barrier:
                self._round.add(client, now)
            steps = self._fedcompass.assign(client, now) if self._fedcompass else 0
            job = job_name(self._config.name, self._epoch, self.job_number, client)
            self.open_jobs[job] = client
            self._jobs[client][job] = None
            dispatched.append(Dispatch(job, self.job_number, client, steps))
        return dispatched

    def _has_room(self, without_slot: int) -> bool:
        if self._config.barrier:
            return self._round.has_room(len(self.open_jobs) + without_slot)
        return len(self.open_jobs) < self._config.concurrency

    def _choose(self, number: int, nothing_under_way: bool) -> str | None:
        """Return the client of job `number`; None if every idle client has reached the cap and would exceed it."""
        first = self._idle.first()
        if first is None:
            return None
        client, place = first
        if place.beyond_cap and not nothing_under_way:
            return None
        return self._idle.drawn(draw(self._config.seed, number)) if self._selection.draws else client

    def _free(self, job: str, client: str) -> None:
        if self.open_jobs.pop(job, None) is not None:
            jobs = self._jobs[client]
            del jobs[job]
            if not jobs:
                del self._jobs[client]

    def _leave_group(self, client: str) -> None:
        self._round.drop(client)
        if self._fedcompass:
            self._fedcompass.lost(client)
