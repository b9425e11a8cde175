"""The federation as a pure state machine: events in, actions out. No clock, no socket, no thread.

Read `handle` from top to bottom: it is the path of an update. The caller (`service.py` over Redis, a test, a
simulation) tells what happened and when, and carries the actions out in the order in which they come back.

    a client joins          → it is idle                      → dispatch
    a header arrives        → its slot is free at once        → dispatch, then load the payload
    the payload is there    → weigh it by its staleness now   → add it to the aggregate
    the buffer is full      → the server optimizer steps      → commit the new version
    a job ends otherwise    → its slot is free                → dispatch

The arrival order is the only input that decides the bits of the model: with the same updates in the same order, every
version is the same, whoever crashed in between.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fedqueue.config.loading import Config
from fedqueue.tensors.codec import downward, upward
from fedqueue.tensors.frame import Delta, Frame
from fedqueue_coordinator.algorithms.aggregator import Contribution
from fedqueue_coordinator.algorithms.registry import make_aggregator
from fedqueue_coordinator.algorithms.server_optimizer import ServerOptimizer
from fedqueue_coordinator.core import admission
from fedqueue_coordinator.core.admission import Inadmissible, admit_frame, admit_header, admit_to_round
from fedqueue_coordinator.core.evaluation_schedule import EvaluationSchedule
from fedqueue_coordinator.core.events import (
    Acknowledge,
    Action,
    ClientJoined,
    ClientLeft,
    Close,
    Commit,
    Evaluate,
    Evaluated,
    Event,
    JobEnded,
    JobLapsed,
    JobStays,
    Load,
    Stop,
    Tick,
    UpdateArrived,
    UpdateLoaded,
    UpdateUnreadable,
)
from fedqueue_coordinator.core.ledger_records import abandoned_record, merged_line, rejected_record, version_record
from fedqueue_coordinator.core.norm_limit import NormLimit
from fedqueue_coordinator.core.outlier_filter import OutlierFilter
from fedqueue_coordinator.core.penalties import penalize_ending, penalize_rejection
from fedqueue_coordinator.core.run_counters import RunCounters
from fedqueue_coordinator.core.scheduler import Scheduler
from fedqueue_coordinator.core.server_state import AGGREGATION, FILTER, MODEL, OPTIMIZER, load_state, save_state
from fedqueue_coordinator.core.stop_conditions import stop_reason, target_reached
from fedqueue_coordinator.service.payload_reader import PayloadReader


class Federation:
    """One run's coordinator. `model` is the newest version's frame, `version` its number.

    A successor continues where the last commit left off: it passes what that commit stored, and then `adopt`s the
    jobs that were open. `norms` are those of the updates merged so far, where `[admission]` asks for a quantile.
    """

    def __init__(
        self,
        config: Config,
        model: Frame,
        version: int = 0,
        job_number: int = 0,
        optimizer_state: bytes = b"",
        totals: RunCounters | None = None,
        evaluates: bool = True,
        epoch: int = 0,
        norms: Sequence[float] = (),
    ) -> None:
        self.config = config
        self.epoch = epoch
        self.model = model
        self.version = version
        self.totals = totals or RunCounters()
        self.rejected: Counter[str] = Counter()
        self.abandoned: Counter[str] = Counter()
        self.evaluated: Evaluated | None = None  # the newest central evaluation
        self.stopped: Stop | None = None
        self.up = upward(config.compression, model.manifest)
        self.down = downward(config.compression, model.manifest)
        self._aggregator = make_aggregator(config)
        self._optimizer = ServerOptimizer(config.server_optimizer, model, version)
        self._filter = OutlierFilter(config.aggregation.filter, model.manifest.parameters)
        self._accumulator = self._aggregator.init(model.manifest)
        self.payloads = PayloadReader(self._aggregator, self._accumulator, self.up)
        state = load_state(optimizer_state)
        self._optimizer.restore(state[OPTIMIZER])
        self._filter.restore(state[FILTER])
        self._accumulator.state.update(state[AGGREGATION])
        if state[MODEL]:
            model.parameters.copy_(state[MODEL]["parameters"])
        self._buffer: list[tuple[UpdateArrived, dict[str, Any]]] = []
        self._arriving: set[str] = set()  # jobs whose update is here, neither merged nor rejected yet
        self._norms = NormLimit(config.admission, norms)
        self._scheduler = Scheduler(config, self.totals, epoch, job_number, started=version > 0 or job_number > 0)
        self._alone: set[str] = set()  # jobs whose update makes a version without waiting for others
        self._evaluations = EvaluationSchedule(config.evaluation, evaluates)

    def restore_jobs(
        self,
        open_jobs: Mapping[str, str],
        registered: Mapping[str, int],
        last_jobs: Mapping[str, int] | None = None,
    ) -> None:
        """Take over the jobs (→ client) that a predecessor left open, what clients had registered, and their turns.

        `last_jobs` is client → the number of its last job.
        """
        self._scheduler.restore_jobs(open_jobs, registered, last_jobs or {})

    def restore_quarantines(self, ledger: Iterable[Mapping[str, Any]], now: float) -> None:
        """Of a predecessor's ledger: who is quarantined by the filter, and until when."""
        for client, end in self._filter.restore_quarantines(ledger, now).items():
            self._scheduler.backoff.rest(client, end)

    # The path of an update

    def handle(self, event: Event, now: float) -> list[Action]:
        """What to do about `event`, which happened at `now` seconds of the run's clock."""
        if self.stopped:
            return self._turn_away(event, now)
        actions: list[Action] = []
        match event:
            case ClientJoined(client, examples):
                self._scheduler.join(client, examples)
            case ClientLeft(client, keeps_job):
                self._scheduler.leave(client)
                if not keeps_job:
                    actions += self._take_back_job_of(client, now)
            case UpdateArrived() if self.open_jobs.get(event.job) != event.client:
                actions.append(self._refuse_unknown(event, now))
            case UpdateArrived(distrust=(reason, detail)):
                self._scheduler.arrived(event.job, event.client, now)
                actions.append(self._reject(event, reason, detail, now))
            case UpdateArrived():
                self._arriving.add(event.job)
                if self._scheduler.arrived(event.job, event.client, now):
                    self._alone.add(event.job)
                actions += self._dispatch(now)
                actions += self._admit(event, now)
            case UpdateLoaded(load, frame, base):
                actions += self._merge(load, frame, base, now)
            case UpdateUnreadable(load, detail, why):
                actions.append(self._reject(load.arrived, why, detail, now))
            case JobEnded() if self.open_jobs.get(event.job) != event.client:
                actions.append(Acknowledge(event.entry, None))  # the job was taken back before
            case JobEnded(entry, job, client, reason, error):
                actions.append(self._abandon(job, client, entry, reason, error, now))
                penalize_ending(self._scheduler.backoff, client, reason, now)
                actions += self._pass_on(job, client, now)
            case JobLapsed(job, client):
                self.abandoned["lapsed"] += 1
                actions += self._pass_on(job, client, now)
            case JobStays(job, client, reason):
                self.abandoned[reason] -= 1
                self.restore_jobs({job: client}, {})
            case Evaluated():
                self.evaluated = event
                self._evaluations.finished()
            case Tick():
                for client in self._scheduler.backoff.rested(now):
                    self._scheduler.offer(client)
        actions += self._dispatch(now)
        if isinstance(event, Tick) and self._round_closes(now):
            actions += self._commit(now)
            actions += self._dispatch(now)
        actions += self._close_groups(now)
        actions += self._stop(now)
        if not self.stopped:  # the evaluation that reached the target stays the last one
            actions += self._evaluate(now)
        # Loads come last: what was loaded may come back, and change the model, before this list is done with.
        return sorted(actions, key=lambda action: isinstance(action, Load))

    def _admit(self, event: UpdateArrived, now: float) -> list[Action]:
        try:
            header = admit_header(
                event,
                self.up,
                self.version,
                self.config.aggregation.max_staleness,
                self._scheduler.registered.get(event.client, 0),
                self.config.barrier,
            )
        except Inadmissible as verdict:
            return [self._reject(event, verdict.reason, verdict.detail, now)]
        return [Load(event, header, self._aggregator.needs_base)]

    def _merge(self, load: Load, frame: Delta, base: Frame | None, now: float) -> list[Action]:
        arrived, header = load.arrived, load.header
        try:
            if self.config.barrier:
                admit_to_round(arrived.base, self.version)
            norm = admit_frame(frame)
            self._norms.check(norm)
            if self.config.aggregation.filter.on or not self._aggregator.takes_pieces:
                frame = frame.whole()
                self._filter.judge(frame.parameters, norm)
            self._norms.accept(norm)
        except Inadmissible as verdict:
            return [self._reject(arrived, verdict.reason, verdict.detail, now)]
        self._arriving.discard(arrived.job)
        self._scheduler.backoff.succeeded(arrived.client)
        self._scheduler.offer(arrived.client)  # an earlier update's rejection may have set it aside meanwhile
        staleness = self.version - arrived.base
        update = Contribution(frame, header.examples, staleness, base, arrived.client)
        if self.config.aggregation.filter.on:
            self._filter.admitted(frame.whole().parameters, norm)
        weight = self._aggregator.add(self._accumulator, update, self.model)
        line = merged_line(arrived, header, staleness=staleness, weight=weight, norm=norm, seconds=now)
        self._buffer.append((arrived, line))
        return self._commit(now) if self._buffer_is_full(arrived.job) else []

    def _buffer_is_full(self, job: str) -> bool:
        """Whether this job's update was the last that the coming version waited for."""
        if not self._scheduler.fedcompass:
            return len(self._buffer) >= self._aggregator.buffer_size
        alone = job in self._alone
        self._alone.discard(job)
        return alone or len(self._buffer) >= max(self._aggregator.buffer_size, self.config.concurrency)

    def _commit(self, now: float) -> list[Action]:
        self._optimizer.step(self._aggregator.finish(self._accumulator, self.model))
        self._accumulator.clear()
        buffer, self._buffer = self._buffer, []
        self._filter.committed(arrived.client for arrived, _ in buffer)
        self.version += 1
        self._scheduler.turns.committed(self.version, [arrived.client for arrived, _ in buffer], now)
        for arrived, line in buffer:
            line["share"] = self._scheduler.turns.share(arrived.client)
        record = version_record(self.version, [line for _, line in buffer], now)
        commit = Commit(self.version, tuple(arrived for arrived, _ in buffer), record)
        return [commit, *self._close_round(now)] if self.config.barrier else [commit]

    @property
    def clients(self) -> Mapping[str, int]:
        """Alive clients, with the number of examples each registered."""
        return self._scheduler.clients

    @property
    def open_jobs(self) -> Mapping[str, str]:
        """Job → client."""
        return self._scheduler.open_jobs

    @property
    def needs_base(self) -> bool:
        """Whether the base versions of open jobs must stay stored."""
        return self._aggregator.needs_base

    @property
    def unfinished(self) -> dict[str, str]:
        """Job → client for every job that has no ending yet: open, on its way, or buffered."""
        return {**self.open_jobs, **{arrived.job: arrived.client for arrived, _ in self._buffer}}

    @property
    def job_number(self) -> int:
        """How many jobs have been dispatched."""
        return self._scheduler.job_number

    @property
    def buffered(self) -> int:
        """How many updates wait for the next version."""
        return len(self._buffer)

    @property
    def optimizer_state(self) -> bytes:
        """What the server remembers after `version`: of optimizer, aggregation, filter, and the model if it is rounded.

        A version is rounded when it is published; a successor goes on from the exact one, which is in no version.
        """
        parts = {OPTIMIZER: self._optimizer.state, AGGREGATION: self._accumulator.state, FILTER: self._filter.state}
        return save_state({**parts, MODEL: {"parameters": self.model.parameters}} if self.down.encoding else parts)

    # Slots

    def _dispatch(self, now: float) -> list[Action]:
        return [*self._scheduler.dispatch(len(self._arriving), len(self._buffer), self.version, now)]

    def _pass_on(self, job: str, client: str, now: float) -> list[Action]:
        """The job ended without an update: its slot goes to another client, or back to this one if it is alone."""
        self._scheduler.lost(job, client)
        actions = self._dispatch(now)
        self._scheduler.offer(client)
        return actions

    def _round_closes(self, now: float) -> bool:
        """Behind a barrier, the round closes with those who came at its deadline, or when nobody can join it any more.

        Asked at a tick: a successor reads the updates of its predecessor before it knows who is alive.
        """
        if not (self.config.barrier and self._buffer) or self._arriving:
            return False
        return self._scheduler.cohort.is_over(now) or self._scheduler.nobody_can_join

    def _close_round(self, now: float) -> list[Action]:
        """Whoever still trains for the version that was made is late; everybody may train for the next one."""
        return [self._abandon(job, client, "", "late", "", now) for job, client in self._scheduler.close_round()]

    def _close_groups(self, now: float) -> list[Action]:
        """A group that has come, or is waited for no longer, makes a version; then its clients go on."""
        fedcompass = self._scheduler.fedcompass
        free = fedcompass.close_groups(now) if fedcompass and not self._arriving else []
        if not free:
            return []
        actions = self._commit(now) if self._buffer else []
        for client in free:
            self._scheduler.offer(client)
        return actions + self._dispatch(now)

    # Endings other than a merge

    def _reject(self, arrived: UpdateArrived, reason: str, detail: str, now: float) -> Close:
        self.rejected[reason] += 1
        self._arriving.discard(arrived.job)
        self._alone.discard(arrived.job)
        self._scheduler.rejected(arrived.client)
        detail += penalize_rejection(self._scheduler.backoff, self._filter, arrived.client, reason, now)
        self._scheduler.withdraw(arrived.client)
        self._scheduler.offer(arrived.client)
        return Close(arrived.job, arrived.entry, rejected_record(arrived, reason, detail, self.version, now))

    def _abandon(self, job: str, client: str, entry: str, reason: str, error: str, now: float) -> Close:
        self.abandoned[reason] += 1
        return Close(job, entry, abandoned_record(job, client, reason, error, self.version, now))

    def _take_back_job_of(self, client: str, now: float) -> list[Action]:
        """A worker that leaves has ended the job it trained for: one still open was waiting in its queue."""
        jobs = [job for job, of in self.open_jobs.items() if of == client]
        for job in jobs:
            self._scheduler.lost(job, client)
        return [self._abandon(job, client, "", "returned", "", now) for job in jobs]

    def _refuse_unknown(self, arrived: UpdateArrived, now: float) -> Acknowledge:
        """An entry that no open job accounts for: forged, or the second one of its job."""
        self.rejected[admission.UNKNOWN_JOB] += 1
        record = rejected_record(arrived, admission.UNKNOWN_JOB, "no such job is open", self.version, now)
        return Acknowledge(arrived.entry, record)

    # Evaluation and the end

    def _evaluate(self, now: float) -> list[Action]:
        return [Evaluate(self.version)] if self._evaluations.begin_if_due(self.version, now) else []

    def _stop(self, now: float) -> list[Action]:
        if self._scheduler.registered and all(map(self._scheduler.backoff.set_aside, self._scheduler.registered)):
            return self.stop(Stop("every client failed too often and was set aside", failed=True), now)
        if self.evaluated and self.evaluated.error:
            return self.stop(Stop(f"the evaluation failed: {self.evaluated.error}", failed=True), now)
        if self.evaluated and (reached := target_reached(self.config.stop.target, self.evaluated)):
            return self.stop(Stop(reached), now)
        because = stop_reason(self.config.stop, self.version, self.totals.updates, now)
        return self.stop(Stop(because), now) if because else []

    def stop(self, stop: Stop, now: float) -> list[Action]:
        """End the run: what is buffered is turned away, what is open is abandoned."""
        self.stopped = stop
        actions: list[Action] = [
            self._reject(arrived, admission.RUN_ENDED, "the run ended before its buffer was full", now)
            for arrived, _ in self._buffer
        ]
        self._buffer = []
        actions += [
            self._abandon(job, client, "", "run_ended", "", now) for job, client in sorted(self.open_jobs.items())
        ]
        self._scheduler.open_jobs.clear()
        return [*actions, stop]

    def _turn_away(self, event: Event, now: float) -> list[Action]:
        match event:
            case UpdateArrived(entry=entry):  # its job was abandoned when the run ended
                return [Acknowledge(entry, None)]
            case UpdateLoaded(load) | UpdateUnreadable(load):
                return [self._reject(load.arrived, admission.RUN_ENDED, "the run has ended", now)]
            case JobEnded(entry=entry):
                return [Acknowledge(entry, None)]
            case JobStays(job, client, reason):
                self.abandoned[reason] -= 1
                return [self._abandon(job, client, "", "run_ended", "", now)]
        return []

    def next_deadline(self) -> float | None:
        """When a `Tick` is needed at the latest, on the run's clock; None where nothing waits for time."""
        ends = [
            self._scheduler.backoff.next_end(),
            self.config.stop.seconds or None,
            self._evaluations.next_deadline(self.version),
            self._scheduler.cohort.deadline if self._buffer else None,
            self._scheduler.fedcompass.next_deadline() if self._scheduler.fedcompass else None,
        ]
        return min((end for end in ends if end is not None), default=None)
