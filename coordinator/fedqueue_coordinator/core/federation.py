"""The federation as a pure state machine: events in, actions out. No clock, no socket, no thread, no file.

Read `handle` from top to bottom: it is the path of an update. The caller (`service/coordinator.py` over Redis, the
simulation, or a test) passes each event with its time, and carries out the actions in the order in which they come
back. An action can have an outcome, which is the next event: the caller passes it after all actions of the present
event.

    a client joins            → it is idle                      → dispatch
    a header arrives          → its slot is free at once        → dispatch, then load the payload
    the payload is loaded     → weigh it by its staleness now   → add it to the aggregate
    the buffer is full        → the server optimizer steps      → commit the new version
    a job ends without update → its slot is free                → dispatch

The arrival order is the only input that decides the bits of the model: the same updates in the same order give the same
versions, whether or not a coordinator crashed in between.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

import torch

from fedqueue.config.schema import Config
from fedqueue.errors import ConfigurationError
from fedqueue.protocol.messages import NO_EXAMPLES
from fedqueue.tensors.blobs import BlobBuffer
from fedqueue.tensors.codec import downlink_codec, uplink_codec
from fedqueue.tensors.frame import Delta, Frame
from fedqueue.tensors.manifest import Manifest
from fedqueue_coordinator.algorithms.aggregator import Contribution
from fedqueue_coordinator.algorithms.registry import make_aggregator
from fedqueue_coordinator.algorithms.server_optimizer import ServerOptimizer
from fedqueue_coordinator.core.admission import Inadmissible, admit_delta, admit_header, admit_to_round
from fedqueue_coordinator.core.evaluation import MAX_FAILED_EVALUATIONS, EvaluationSchedule
from fedqueue_coordinator.core.events import (
    Acknowledge,
    Action,
    ClientJoined,
    ClientLeft,
    ClientUnavailable,
    Close,
    CloseCondition,
    Commit,
    Evaluate,
    Evaluated,
    Event,
    InvalidEntry,
    JobEnded,
    JobLapsed,
    JobStays,
    LeaseExpired,
    Load,
    Stop,
    Tick,
    UpdateArrived,
    UpdateLoaded,
    UpdateUnreadable,
)
from fedqueue_coordinator.core.failures import Failures
from fedqueue_coordinator.core.ledger_records import (
    abandoned_record,
    merged_update,
    rejected_record,
    unavailable_record,
    version_record,
)
from fedqueue_coordinator.core.outliers import NormLimit, OutlierFilter
from fedqueue_coordinator.core.reasons import OUTLIER, AbandonReason, RejectionReason
from fedqueue_coordinator.core.run_counters import RunCounters
from fedqueue_coordinator.core.scheduler import Scheduler
from fedqueue_coordinator.core.server_state import AGGREGATION, FILTER, MODEL, OPTIMIZER, load_state, save_state
from fedqueue_coordinator.core.stop_conditions import require_usable_target, stop_reason, target_reached
from fedqueue_coordinator.core.waiting import dead_end, waiting_for


class Federation:
    """One run's coordinator. `model` is the newest version's frame, `version` its number."""

    def __init__(
        self,
        config: Config,
        model: Frame,
        version: int = 0,
        job_number: int = 0,
        optimizer_state: bytes = b"",
        run_counters: RunCounters | None = None,
        evaluates: bool = True,
        epoch: int = 0,
        norms: Sequence[float] = (),
    ) -> None:
        """Begin a run with `model`, or resume it from what the last commit stored; then call `restore_jobs`.

        `norms` are those of the updates merged so far, oldest first, if `[admission]` limits the norm by a quantile.
        Raises ConfigurationError for an aggregation or an optimizer that cannot be made, and StoreError for an
        `optimizer_state` that does not fit.
        """
        self.config = config
        self.epoch = epoch
        self.model = model
        self.version = version
        self.run_counters = run_counters or RunCounters()
        self.rejected: Counter[str] = Counter()
        """Reason → rejected updates, since this process began."""
        self.abandoned: Counter[str] = Counter()
        """Reason → abandoned jobs, since this process began."""
        self.failures = Failures()
        """Failures by kind, since this process began."""
        self.unavailable: dict[str, str] = {}
        """Client → why its worker cannot load its data, until it joins."""
        self.evaluated: Evaluated | None = None
        """The newest central evaluation that did not fail."""
        self.stopped: Stop | None = None
        self.uplink = uplink_codec(config.compression, model.manifest, config.secure.on)
        self.downlink = downlink_codec(config.compression, model.manifest)
        self._aggregator = make_aggregator(config)
        self._optimizer = ServerOptimizer(config.server_optimizer, model, version)
        self._filter = OutlierFilter(config.aggregation.filter, model.manifest.parameters)
        self._accumulator = self._aggregator.init(model.manifest)
        state = load_state(optimizer_state)
        self._optimizer.restore(state[OPTIMIZER])
        self._filter.restore(state[FILTER])
        self._accumulator.state.update(state[AGGREGATION])
        if state[MODEL]:
            model.parameters.copy_(state[MODEL]["parameters"])
        self._buffer: list[tuple[UpdateArrived, dict[str, Any]]] = []  # with the record of each
        self._arriving: set[str] = set()  # jobs whose update has arrived and is neither merged nor rejected yet
        self._norms = NormLimit(config.admission, norms)
        self._scheduler = Scheduler(config, self.run_counters, epoch, job_number, started=version > 0 or job_number > 0)
        if self._scheduler.started and self.run_counters.started is None:  # before its first commit
            self.run_counters.started = self.run_counters.seconds
        self._alone: set[str] = set()  # jobs whose update makes a version without waiting for others
        self._evaluations = EvaluationSchedule(config.evaluation, evaluates)
        self._may_fail = version > 0  # a failure of the first evaluation is one of the task, not of its surroundings

    def restore_jobs(
        self,
        open_jobs: Mapping[str, str],
        registered: Mapping[str, int | None],
        last_jobs: Mapping[str, int] | None = None,
    ) -> None:
        """Restore open jobs (→ client), registrations (→ examples) and each client's last job number."""
        self._scheduler.restore_jobs(open_jobs, registered, last_jobs or {})

    def restore_quarantines(self, ledger: Iterable[Mapping[str, Any]], now: float) -> None:
        """Restore the outlier filter's strikes and the quarantines that end after `now` from the ledger."""
        self._scheduler.restore_rests(self._filter.restore_quarantines(ledger, now))

    # The path of an update

    def handle(self, event: Event, now: float) -> list[Action]:
        """Return the actions for `event`, which happened at `now` seconds of the run's clock.

        Raises ConfigurationError if the first evaluation shows that stop.target can tell nothing.
        """
        if self.stopped:
            return self._handle_after_stop(event, now)
        actions: list[Action] = []
        ending: Stop | None = None
        match event:
            case ClientJoined(client, examples):
                self.unavailable.pop(client, None)
                self._scheduler.join(client, examples)
            case ClientLeft():
                actions += self._leave(event, now)
            case ClientUnavailable():
                actions += self._leave_out(event, now)
            case UpdateArrived():
                actions += self._receive(event, now)
            case UpdateLoaded(load, delta, base):
                actions += self._merge(load, delta, base, now)
            case UpdateUnreadable(load, reason, detail):
                actions.append(self._reject(load.arrived, reason, detail, now))
            case InvalidEntry():
                actions.append(self._refuse_entry(event, now))
            case JobEnded():
                actions += self._end_job(event, now)
            case LeaseExpired():
                actions += self._close_lapsed(event, now)
            case JobLapsed(job, client, cause, detail):
                self.abandoned[AbandonReason.LAPSED] += 1
                self.failures.abandoned(client, AbandonReason.LAPSED, detail)
                was_set_aside = self._scheduler.is_set_aside(client)
                self._scheduler.penalize_lapse(client, cause, now)
                self._note_set_aside(client, was_set_aside)
                actions += self._pass_on(job, client, now)
            case JobStays(job, client, abandoned_for):
                self.abandoned[abandoned_for] -= 1
                self.restore_jobs({job: client}, {})
            case Evaluated():
                ending = self._judge(event, now)
            case Tick():
                self._scheduler.end_rests(now)
        actions += self._dispatch(now)
        if isinstance(event, Tick) and self._round_closes(now):
            actions += self._commit(now)
            actions += self._dispatch(now)
        actions += self._close_groups(now)
        if self.run_counters.started is None and self._scheduler.started:
            self.run_counters.started = now
        actions += self._stop_if_due(ending, now)
        if not self.stopped:  # else the evaluation that reached the target would not be the last one
            actions += self._evaluate(now)
        return actions

    def _receive(self, arrived: UpdateArrived, now: float) -> list[Action]:
        """Free the slot of the job, and check the header."""
        if self.open_jobs.get(arrived.job) != arrived.client:
            return [self._refuse_unknown(arrived, now)]
        alone = self._scheduler.arrived(arrived.job, arrived.client, now)
        if arrived.distrust:
            reason, detail = arrived.distrust
            return [self._reject(arrived, reason, detail, now)]
        self._arriving.add(arrived.job)
        if alone:
            self._alone.add(arrived.job)
        dispatched = self._dispatch(now)
        return [*dispatched, self._admit(arrived, now)]

    def _admit(self, arrived: UpdateArrived, now: float) -> Load | Close:
        try:
            header = admit_header(
                arrived,
                self.uplink,
                self.version,
                self.config.aggregation.max_staleness,
                self._scheduler.registered.get(arrived.client, 0),
                self.config.barrier,
            )
        except Inadmissible as verdict:
            return self._reject(arrived, verdict.reason, verdict.detail, now)
        self.failures.trained(arrived.client, arrived.base, header.metrics)
        return Load(arrived, header, self._aggregator.needs_base)

    def _merge(self, load: Load, delta: Delta, base: Frame | None, now: float) -> list[Action]:
        arrived, header = load.arrived, load.header
        try:
            if self.config.barrier:
                admit_to_round(arrived.base, self.version)
            norm = admit_delta(delta, self.model)
            self._norms.check(norm)
            if self.config.aggregation.filter.on or not self._aggregator.takes_pieces:
                delta = delta.whole()
                self._filter.judge(delta.parameters, norm)
            self._norms.accept(norm)
        except Inadmissible as verdict:
            return [self._reject(arrived, verdict.reason, verdict.detail, now)]
        self._arriving.discard(arrived.job)
        self._scheduler.merged(arrived.client)
        staleness = self.version - arrived.base
        update = Contribution(delta, header.examples, staleness, base, arrived.client)
        if self.config.aggregation.filter.on:
            self._filter.admitted(delta.whole().parameters, norm)
        weight = self._aggregator.add(self._accumulator, update, self.model)
        record = merged_update(arrived, header, staleness=staleness, weight=weight, norm=norm, seconds=now)
        self._buffer.append((arrived, record))
        return self._commit(now) if self._buffer_is_full(arrived.job) else []

    def _buffer_is_full(self, job: str) -> bool:
        """Whether this job's update was the last that the coming version waits for."""
        if not self._scheduler.forms_groups:
            return len(self._buffer) >= self._aggregator.buffer_size
        alone = job in self._alone
        self._alone.discard(job)
        return alone or len(self._buffer) >= max(self._aggregator.buffer_size, self.config.concurrency)

    def _commit(self, now: float) -> list[Action]:
        """Make the next version from the buffer."""
        self._optimizer.step(self._aggregator.finish(self._accumulator, self.model))
        self._accumulator.clear()
        buffer, self._buffer = self._buffer, []
        self._filter.committed(arrived.client for arrived, _ in buffer)
        self.version += 1
        self._scheduler.committed(self.version, [arrived.client for arrived, _ in buffer], now)
        for arrived, record in buffer:
            record["share"] = self._scheduler.share(arrived.client)
        commit = Commit(
            self.version,
            tuple(arrived for arrived, _ in buffer),
            version_record(self.version, [record for _, record in buffer], now, self._scheduler.take_measured()),
            publish_now=self.config.barrier,
        )
        return [commit, *self._close_round(now)] if self.config.barrier else [commit]

    # What the caller reads

    @property
    def clients(self) -> Mapping[str, int | None]:
        """Alive clients, with the number of examples each registered, None if it is unknown."""
        return self._scheduler.clients

    @property
    def open_jobs(self) -> Mapping[str, str]:
        """Job → client."""
        return self._scheduler.open_jobs

    @property
    def busy(self) -> Container[str]:
        """The clients with an open job; a view, which changes as jobs do."""
        return self._scheduler.busy

    @property
    def needs_base(self) -> bool:
        """Whether the base versions of open jobs must stay stored."""
        return self._aggregator.needs_base

    @property
    def takes_pieces(self) -> bool:
        """Whether a loaded delta may be one that is read piece by piece."""
        return self._aggregator.takes_pieces

    @property
    def free_memory(self) -> BlobBuffer | None:
        """The accumulator's bytes, uint8 [manifest.nbytes], while it is empty: the next payload may be read into them.

        None while the accumulator has an update.
        """
        return self._accumulator.memory if self._accumulator.updates == 0 else None

    @property
    def unfinished(self) -> dict[str, str]:
        """Job → client for every job that is open, or whose update is buffered."""
        return {**self.open_jobs, **{arrived.job: arrived.client for arrived, _ in self._buffer}}

    @property
    def job_number(self) -> int:
        """Number of jobs that have been dispatched."""
        return self._scheduler.job_number

    @property
    def buffered(self) -> int:
        """Number of updates that wait for the next version."""
        return len(self._buffer)

    @property
    def optimizer_state(self) -> bytes:
        """The server's state after `version`: of the optimizer, the aggregation and the outlier filter.

        The exact float32 parameters are stored here too, if published versions are rounded.
        """
        parts = {OPTIMIZER: self._optimizer.state, AGGREGATION: self._accumulator.state, FILTER: self._filter.state}
        return save_state({**parts, MODEL: {"parameters": self.model.parameters}} if self.downlink.encoding else parts)

    def next_deadline(self) -> float | None:
        """Latest time of the next `Tick`, on the run's clock; None if nothing depends on time."""
        ends = [
            self._scheduler.next_deadline(buffered=bool(self._buffer)),
            self._time_limit,
            self._evaluations.next_deadline(self.version),
        ]
        return min((end for end in ends if end is not None), default=None)

    def waiting_for(self, now: float) -> str:
        """Describe what keeps the run from dispatching a job; an empty string if it goes on."""
        return waiting_for(self.config, self._scheduler, self.unavailable, now)

    def dead_end(self, gone: Container[str]) -> str:
        """Describe why the run can never go on, if no client in `gone` comes back; an empty string if it can."""
        return dead_end(self.config, self._scheduler, gone, self.unavailable)

    @property
    def _time_limit(self) -> float | None:
        """Time at which stop.seconds have passed since the clients began to train, or None."""
        started, seconds = self.run_counters.started, self.config.stop.seconds
        return None if started is None or seconds is None else started + seconds

    # Slots

    def _dispatch(self, now: float) -> list[Action]:
        return [*self._scheduler.dispatch(len(self._arriving), len(self._buffer), now)]

    def _pass_on(self, job: str, client: str, now: float) -> list[Action]:
        """Give the slot of a job that ended to another client, or to this one if no other is idle."""
        self._scheduler.lost(job, client)
        actions = self._dispatch(now)
        self._scheduler.offer(client)
        return actions

    def _round_closes(self, now: float) -> bool:
        """Whether the round behind a barrier closes with the updates it has: at its deadline, or if no client can join.

        Only a tick asks: a resumed run reads the updates that wait before it knows which clients are alive.
        """
        if not (self.config.barrier and self._buffer) or self._arriving:
            return False
        return self._scheduler.round_is_over(now)

    def _close_round(self, now: float) -> list[Action]:
        """Begin the next round; the jobs that are still open are late."""
        return [
            self._abandon(job, client, "", AbandonReason.LATE, "", now, CloseCondition.UNPOSTED)
            for job, client in self._scheduler.close_round()
        ]

    def _close_groups(self, now: float) -> list[Action]:
        """Make a version from each group that is complete or past its deadline; then its clients may train again."""
        free = self._scheduler.close_groups(now) if not self._arriving else []
        if not free:
            return []
        actions = self._commit(now) if self._buffer else []
        for client in free:
            self._scheduler.offer(client)
        return actions + self._dispatch(now)

    # Endings other than a merge

    def _reject(self, arrived: UpdateArrived, reason: RejectionReason, detail: str, now: float) -> Close:
        """Reject an update whose job has no slot any more."""
        self.rejected[reason] += 1
        self.failures.rejected(arrived.client, reason, detail)
        self._arriving.discard(arrived.job)
        self._alone.discard(arrived.job)
        quarantine = self._filter.strike(arrived.client) if reason in OUTLIER else 0.0
        if quarantine:
            detail += f"; quarantined for {quarantine:g} s"
        was_set_aside = self._scheduler.is_set_aside(arrived.client)
        self._scheduler.rejected(arrived.client, reason, quarantine, now)
        self._note_set_aside(arrived.client, was_set_aside)
        return Close(arrived.job, arrived.entry.id, rejected_record(arrived, reason, detail, self.version, now))

    def _abandon(
        self,
        job: str,
        client: str,
        entry: str,
        reason: AbandonReason,
        error: str,
        now: float,
        only_if: CloseCondition = CloseCondition.ANY,
    ) -> Close:
        self.abandoned[reason] += 1
        self.failures.abandoned(client, reason, error)
        return Close(job, entry, abandoned_record(job, client, reason, error, self.version, now), only_if)

    def _leave(self, left: ClientLeft, now: float) -> list[Action]:
        """Remove a client.

        A worker that announces that it leaves has ended the job it trained: a job that is still open waits in its
        queue, and is taken back unless another worker serves the client. Otherwise the job keeps its own lease.
        """
        self._scheduler.leave(left.client)
        if left.served or not left.announced:
            return []
        jobs = self._scheduler.jobs_of(left.client)
        for job in jobs:
            self._scheduler.lost(job, left.client)
        return [
            self._abandon(job, left.client, "", AbandonReason.RETURNED, "", now, CloseCondition.UNPOSTED)
            for job in jobs
        ]

    def _leave_out(self, event: ClientUnavailable, now: float) -> list[Action]:
        """Leave out a client whose data cannot be loaded, until another worker serves it."""
        self.failures.unavailable(event.client, event.error)
        record = unavailable_record(event.client, event.error, self.version, now)
        if event.served:
            return [Acknowledge(event.entry, record)]
        if event.error == NO_EXAMPLES:
            self._scheduler.without_examples.add(event.client)
        else:
            self.unavailable[event.client] = event.error
        return [*self._leave(ClientLeft(event.client), now), Acknowledge(event.entry, record)]

    def _end_job(self, ended: JobEnded, now: float) -> list[Action]:
        if self.open_jobs.get(ended.job) != ended.client:
            return [Acknowledge(ended.entry, None)]  # the job was taken back before
        close = self._abandon(ended.job, ended.client, ended.entry, ended.reason, ended.error, now)
        was_set_aside = self._scheduler.is_set_aside(ended.client)
        self._scheduler.penalize_ending(ended.client, ended.reason, now)
        self._note_set_aside(ended.client, was_set_aside)
        return [close, *self._pass_on(ended.job, ended.client, now)]

    def _note_set_aside(self, client: str, before: bool) -> None:
        if not before and self._scheduler.is_set_aside(client):
            self.failures.set_aside(client)

    def _close_lapsed(self, expired: LeaseExpired, now: float) -> list[Action]:
        """Close a job whose lease is over; it counts once the store has closed it (`JobLapsed`)."""
        client = self.open_jobs.get(expired.job)
        if client is None:
            return []
        record = abandoned_record(expired.job, client, AbandonReason.LAPSED, expired.detail, self.version, now)
        return [Close(expired.job, "", record, CloseCondition.LAPSED, expired.cause)]

    def _refuse_unknown(self, arrived: UpdateArrived, now: float) -> Acknowledge:
        """Refuse an update for which no job is open: it is forged, or the second one of its job."""
        reason = RejectionReason.UNKNOWN_JOB
        detail = "no such job is open"
        self.rejected[reason] += 1
        self.failures.rejected(arrived.client, reason, detail)
        return Acknowledge(arrived.entry.id, rejected_record(arrived, reason, detail, self.version, now))

    def _refuse_entry(self, invalid: InvalidEntry, now: float) -> Acknowledge:
        self.failures.rejected(invalid.entry.client, invalid.reason, invalid.detail)
        record = rejected_record(invalid.entry, invalid.reason, invalid.detail, self.version, now)
        return Acknowledge(invalid.entry.id, record)

    # Evaluation and the end

    def _evaluate(self, now: float) -> list[Action]:
        return [Evaluate(self.version)] if self._evaluations.begin_if_due(self.version, now) else []

    def _judge(self, evaluated: Evaluated, now: float) -> Stop | None:
        """End the evaluation in progress; return the end of the run if the evaluation is a reason for one."""
        goals, failed = self.config.stop.goals, bool(evaluated.error)
        self._evaluations.finished(failed, now)
        self.failures.evaluated(evaluated.version, evaluated.metrics, evaluated.error)
        if failed:
            if not self._may_fail:
                return Stop(f"the evaluation failed: {evaluated.error}", failed=True)
            if (times := self._evaluations.failed) >= MAX_FAILED_EVALUATIONS:
                because = f"the evaluation failed {times} times in a row, at last with {evaluated.error}"
                return Stop(because, failed=True, resumable=True)
            return None
        if self.evaluated is None:
            require_usable_target(goals, evaluated)
        self.evaluated = evaluated
        self._may_fail = True
        reached = target_reached(goals, evaluated)
        return Stop(reached, version=evaluated.version) if reached else None

    def _stop_if_due(self, ending: Stop | None, now: float) -> list[Action]:
        if self._scheduler.all_set_aside:
            worst = self.failures.most_frequent
            because = "every client failed too often and was set aside" + (f": {worst.line}" if worst else "")
            return self.stop(Stop(because, failed=True), now)
        if ending:
            return self.stop(ending, now)
        started = self.run_counters.started
        trained = None if started is None else now - started
        because = stop_reason(self.config.stop, self.version, self.run_counters.updates, trained)
        return self.stop(self._end_at(because), now) if because else []

    def _end_at(self, limit: str) -> Stop:
        """End at a limit; without any merged update the run has failed."""
        if self.version:
            return Stop(limit)
        worst = self.failures.most_frequent
        return Stop(f"{limit}; no update was merged" + (f": {worst.line}" if worst else ""), failed=True)

    def stop(self, stop: Stop, now: float) -> list[Action]:
        """End the run: reject the buffered updates and abandon the open jobs."""
        self.stopped = stop
        actions: list[Action] = [
            self._reject(arrived, RejectionReason.RUN_ENDED, "the run ended before its buffer was full", now)
            for arrived, _ in self._buffer
        ]
        self._buffer = []
        actions += [
            self._abandon(job, client, "", AbandonReason.RUN_ENDED, "", now)
            for job, client in self._scheduler.close_all()
        ]
        return [*actions, stop]

    def _handle_after_stop(self, event: Event, now: float) -> list[Action]:
        """Settle what still arrives, so that no stream entry and no job is left."""
        match event:
            case UpdateArrived():  # its job was abandoned when the run ended
                return [Acknowledge(event.entry.id, None)]
            case UpdateLoaded(load=load) | UpdateUnreadable(load=load):
                return [self._reject(load.arrived, RejectionReason.RUN_ENDED, "the run has ended", now)]
            case InvalidEntry():
                return [self._refuse_entry(event, now)]
            case JobEnded(entry=entry) | ClientUnavailable(entry=entry):
                return [Acknowledge(entry, None)]
            case JobStays(job, client, reason):
                self.abandoned[reason] -= 1
                return [self._abandon(job, client, "", AbandonReason.RUN_ENDED, "", now)]
        return []


def initial_model(config: Config, module: torch.nn.Module) -> Frame:
    """Make version 0 from the module's values, rounded as versions are published.

    A replay of the run begins from the stored version 0, so version 0 itself must be what is stored. Raises
    ManifestMismatch for a model with buffers that a run with keepers cannot merge.
    """
    model = Frame(Manifest.from_module(module, config.aggregation))
    if config.secure.on:
        model.manifest.require_maskable(config.aggregation.running_statistics)
    model.read(module)
    codec = downlink_codec(config.compression, model.manifest)
    if not codec.encoding:
        return model
    rounded = codec.decode(codec.encode(model, 0)).whole()
    rounded.frozen = model.frozen
    lost = torch.nonzero(~torch.isfinite(rounded.parameters)).flatten()
    if len(lost):
        name = model.manifest.parameter_at(int(lost[0])).name
        raise ConfigurationError(
            "compression.downlink", config.compression.downlink,
            f"cannot encode {name}, which has infinite or too large values",
            "write 'float32', or freeze the parameter with requires_grad_(False) in model()",
        )  # fmt: skip
    return rounded
