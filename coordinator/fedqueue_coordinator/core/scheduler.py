"""Who trains, who could, and who gets the next job: the slots of a federation.

A client is offered its place when it joins, when its update arrives and when its job ends; `dispatch` fills what is
free. Whether a client may train again depends on its rests (`dispatch.py`), its round (`cohort.py`) or its group
(`compass.py`); which one of those that may is chosen by `turns.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from fedqueue.config.loading import Config
from fedqueue.protocol.keys import job_name
from fedqueue_coordinator.core.dispatch import Backoff, IdlePool
from fedqueue_coordinator.core.events import Dispatch
from fedqueue_coordinator.core.fair_share import FairShare
from fedqueue_coordinator.core.fedcompass import FedCompass
from fedqueue_coordinator.core.run_counters import RunCounters
from fedqueue_coordinator.core.sync_round import SyncRound


class Scheduler:
    """`job_number` is that of the last job; job names of different `epoch`s differ."""

    def __init__(self, config: Config, totals: RunCounters, epoch: int, job_number: int, started: bool) -> None:
        self.clients: dict[str, int] = {}
        """Alive clients, with the number of examples each registered."""
        self.registered: dict[str, int] = {}
        """Also of clients that left: their late updates are checked too."""
        self.open_jobs: dict[str, str] = {}
        """Job → client."""
        self.job_number = job_number
        rests, limit = config.dispatch, config.admission.max_rejections
        self.backoff = Backoff(rests.backoff_seconds, rests.max_client_failures, limit)
        self.turns = FairShare(config, totals)
        self.cohort = SyncRound(config)  # stays empty without a barrier
        fedcompass = config.dispatch.schedule == "compass"
        self.fedcompass = FedCompass(config.dispatch.compass, totals.step_seconds) if fedcompass else None
        self._config, self._totals, self._epoch = config, totals, epoch
        self._idle = IdlePool()
        self._busy: Counter[str] = Counter()  # client → open jobs; more than one only where they were adopted
        self._started = started

    def restore_jobs(
        self, open_jobs: Mapping[str, str], registered: Mapping[str, int], last_jobs: Mapping[str, int]
    ) -> None:
        """Take over what a predecessor left; `last_jobs` is client → the number of its last job."""
        self.open_jobs.update(open_jobs)
        self._busy.update(open_jobs.values())
        self.registered.update(registered)
        self.turns.last_job.update(last_jobs)
        if self._config.barrier:
            for client in open_jobs.values():
                self.cohort.ask(client, self._totals.seconds)  # its round began with the newest version

    def join(self, client: str, examples: int) -> None:
        self.clients[client] = self.registered[client] = examples
        self.offer(client)

    def leave(self, client: str) -> None:
        self.clients.pop(client, None)
        self._idle.discard(client)

    def arrived(self, job: str, client: str, now: float) -> bool:
        """The job's update is here: its slot is free. True where the schedule has it make a version alone."""
        self.free(job, client)
        self.turns.arrived(client)
        alone = self.fedcompass.arrived(client, now) if self.fedcompass else False
        self.offer(client)
        return alone

    def free(self, job: str, client: str) -> None:
        if self.open_jobs.pop(job, None) is not None:
            self._busy[client] -= 1

    def lost(self, job: str, client: str) -> None:
        """The job ends without an update: its slot is free, and no cohort and no group waits for the client."""
        self._leave_group(client)
        self.free(job, client)

    def rejected(self, client: str) -> None:
        """Its update is not merged; it may have begun another job meanwhile, which stays as it is."""
        self.turns.rejected(client)
        if not self._busy[client]:
            self._leave_group(client)

    def _leave_group(self, client: str) -> None:
        self.cohort.drop(client)
        if self.fedcompass:
            self.fedcompass.lost(client)

    def withdraw(self, client: str) -> None:
        """The client is not to be chosen until it is offered its place again."""
        self._idle.discard(client)

    def offer(self, client: str) -> None:
        """The client may train again, if it is alive, idle, rested, and waits for no cohort or group."""
        taken = self._busy[client] > 0 or client in self.cohort or (self.fedcompass and self.fedcompass.waits(client))
        if client in self.clients and not taken and self.backoff.allows(client):
            self._idle.add(client)

    def close_round(self) -> list[tuple[str, str]]:
        """The version is made: all may train for the next one. Returns the jobs (and clients) that are late."""
        late = sorted(self.open_jobs.items())
        for job, client in late:
            self.free(job, client)
        self.cohort.close()
        for client in self.clients:
            self.offer(client)
        return late

    @property
    def nobody_can_join(self) -> bool:
        """Whether no client trains, is idle or will be after a rest."""
        return not (self.open_jobs or self._idle or self.backoff.resting)

    def dispatch(self, arriving: int, buffered: int, version: int, now: float) -> list[Dispatch]:
        """Fill the free slots; `arriving` and `buffered` updates are behind theirs."""
        self._started = self._started or len(self.clients) >= self._config.minimum_clients
        dispatched: list[Dispatch] = []
        while self._started and self._idle and self._has_room(arriving + buffered):
            client = self._choose(self.job_number + 1, version, nothing_under_way=not (self.open_jobs or arriving))
            if client is None:  # each has had its share for now
                break
            self.job_number += 1
            self._idle.discard(client)
            self._busy[client] += 1
            self.turns.last_job[client] = self.job_number
            if self._config.barrier:
                self.cohort.ask(client, now)
            steps = self.fedcompass.assign(client, now) if self.fedcompass else 0
            job = job_name(self._config.name, self._epoch, self.job_number, client)
            self.open_jobs[job] = client
            dispatched.append(Dispatch(job, self.job_number, client, steps))
        return dispatched

    def _has_room(self, behind: int) -> bool:
        if self._config.barrier:
            return self.cohort.has_room(len(self.open_jobs) + behind)
        return len(self.open_jobs) < self._config.concurrency

    def _choose(self, number: int, version: int, nothing_under_way: bool) -> str | None:
        candidates = self.turns.within_share(self._idle.clients, self._busy, nothing_under_way)
        if not candidates:
            return None
        if self.fedcompass:
            return self.fedcompass.fastest(candidates)
        return self.turns.choose(candidates, number, version, self.registered)
