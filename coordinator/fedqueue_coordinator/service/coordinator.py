"""The coordinator's loop: what Redis says goes into the federation as events, what comes out is done in Redis.

There is nothing to decide here. An answer that gets lost, a process that dies between two lines: the next coordinator
reads again what no commit has acknowledged, and the scripts refuse what has been done before.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path

import redis
import structlog
import torch

from fedqueue.config.loading import Config
from fedqueue.errors import Fenced, StoreError, WireError
from fedqueue.protocol.messages import Evaluation, Order
from fedqueue.protocol.stream_entry import StreamEntry
from fedqueue.task import Task
from fedqueue.tensors.frame import Frame
from fedqueue.training import choose_device
from fedqueue.transport import rq_jobs
from fedqueue.transport.retry import RedisRetry
from fedqueue.transport.store import chunks_of
from fedqueue_coordinator.algorithms.registry import check_algorithms
from fedqueue_coordinator.core.admission import TAMPERED, unusable_reason
from fedqueue_coordinator.core.dispatch import make_order
from fedqueue_coordinator.core.events import (
    Acknowledge,
    Action,
    ClientJoined,
    ClientLeft,
    Close,
    Commit,
    Dispatch,
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
from fedqueue_coordinator.core.federation import Federation
from fedqueue_coordinator.core.ledger_records import LedgerRecord, abandoned_record, evaluation_record, rejected_record
from fedqueue_coordinator.core.run_summary import RunResult
from fedqueue_coordinator.operator.audit.replay import REPLAY_FOLDER, keep_replay
from fedqueue_coordinator.service.base_versions import BaseVersions
from fedqueue_coordinator.service.checkpoint import CHECKPOINT_FILENAME as CHECKPOINT_FILE
from fedqueue_coordinator.service.checkpoint import Checkpoint, Checkpointer, load_checkpoint
from fedqueue_coordinator.service.coordinator_store import CoordinatorStore
from fedqueue_coordinator.service.entry_verifier import EntryVerifier, reason_of
from fedqueue_coordinator.service.evaluator import Evaluator
from fedqueue_coordinator.service.leader_election import LeaseRenewal, acquire_leadership
from fedqueue_coordinator.service.recovery import (
    as_buffer,
    most_bytes,
    restore_federation,
    unstarted_orders,
    verified_registrations,
)
from fedqueue_coordinator.service.streaming_payload import PayloadChanged

log = structlog.get_logger("fedqueue.coordinator")

MOST_MADE = 32  # versions that are made before they are published
LONGEST_WAIT = 1.0  # seconds; a blocked read ends at once when there is work, this bounds how long a signal waits


class Coordinator:
    """Leads one run over Redis from start, or from where a predecessor left off, to its end."""

    def __init__(
        self,
        config: Config,
        task: Task,
        store: CoordinatorStore,
        folder: Path,
        on_progress: Callable[[Federation, float], None] = lambda federation, now: None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        failpoint: Callable[[str], None] = lambda point: None,
    ) -> None:
        """`folder` is for the checkpoint; `failpoint` is called with the name of each crash point under test."""
        self.config, self.task, self.store = config, task, store
        self._on_progress, self._clock, self._sleep, self._failpoint = on_progress, clock, sleep, failpoint
        self._folder = folder
        self._zero = clock()  # of the run's clock
        self._next_watch = 0.0
        self._ending: Stop | None = None
        self._paused = False
        self._known = False  # that the run is in Redis
        self._made: list[Commit] = []  # versions that were made and are not published yet
        self._checkpointer = Checkpointer(folder / CHECKPOINT_FILE, config.checkpoint.seconds)
        self._verifier = EntryVerifier(store.identity)
        self._retry = RedisRetry(lambda: self._paused or self._ending is not None, sleep)
        self.federation: Federation
        self._base_versions: BaseVersions
        torch.set_num_threads(config.aggregation.threads)
        check_algorithms(config)
        data = task.test_data()
        device = choose_device(config.training.device)
        self._evaluator = None if data is None else Evaluator(task, data, device, self._report)

    def interrupt(self, because: str) -> None:
        """End the run soon, keeping the model so far. Safe to call from a signal handler."""
        self._ending = Stop(because)

    def fail(self, because: str) -> None:
        """End the run soon as failed."""
        self._ending = Stop(because, failed=True)

    def pause(self) -> None:
        """Leave the run as it is, for another coordinator to go on with. Safe to call from a signal handler."""
        self._paused = True

    def run(self, standby: bool = False) -> RunResult | None:
        """Until the run has ended; None where it was paused.

        An outage of Redis is ridden out: afterwards this coordinator takes the run over from itself, as a successor
        would. Raises Fenced where another coordinator took over, ServerUnavailable where waiting cannot help, and
        RunExists where another one leads and `standby` is not wanted.
        """
        while True:
            try:
                return self._lead(standby)
            except redis.RedisError as error:
                self._retry.wait(error)
            except PayloadChanged as error:
                log.error("an update was changed while it was merged: the buffer is read again", error=str(error))
            except Fenced:
                if self.store.exists():
                    raise
                log.warning("the run is not in Redis any more")  # so nobody leads it: begin again, from the disk

    def _lead(self, standby: bool) -> RunResult | None:
        try:
            path, stopped = self._checkpointer.path, lambda: self._paused or self._ending is not None
            if not acquire_leadership(self.store, self.config, path, self._known, standby, stopped, self._sleep):
                return None
            with LeaseRenewal(self.store.renew_lead, self.config.dispatch.leader_seconds):
                return self._go_on()
        finally:
            if self._evaluator:
                self._evaluator.join()
            self._checkpointer.join()
            with contextlib.suppress(redis.RedisError):
                self.store.release_lead()

    def _go_on(self) -> RunResult | None:
        self._begin()
        while not (self.federation.stopped or self._paused):
            self._publish()
            entries = self.store.receive(self._wait_seconds())
            self.store.expect_payloads(entries[1:], self.federation.up)
            for entry in entries:
                self._take(entry)
            self._watch()
            self._handle(Tick())
            if self._ending and not self.federation.stopped:
                self._do(self.federation.stop(self._ending, self._now()))
            self._on_progress(self.federation, self._now())
        return None if self._paused else self._end()

    # Beginning

    def _begin(self) -> None:
        store = self.store
        checkpoint = None if store.exists() else load_checkpoint(self._checkpointer.path)
        self.federation = restore_federation(
            self.config, store, self.task, checkpoint, self._evaluator is not None, self._verifier
        )
        self._known = True
        self._zero = self._clock() - self.federation.totals.seconds
        self._next_watch = self._now()
        self._made = []
        self._queues = rq_jobs.Queues(store.redis)
        self._base_versions = BaseVersions(store, self.federation)
        for order in unstarted_orders(store):  # a job that is in its queue already is left alone
            store.enqueue(self._record(order, store.pack_order(order)))
        for entry in store.unacknowledged():
            self._take(entry)
        registrations = verified_registrations(store, self._verifier)
        for client in store.alive_clients():
            if client in registrations:
                self._handle(ClientJoined(client, registrations[client]))

    # Events

    def _now(self) -> float:
        return self._clock() - self._zero

    def _wait_seconds(self) -> float:
        now = self._now()
        ends = [now + LONGEST_WAIT, self._next_watch, self.federation.next_deadline()]
        return max(0.001, min(end for end in ends if end is not None) - now)

    def _watch(self) -> None:
        """Keep the lead, and see whose lease is over."""
        if self._now() < self._next_watch:
            return
        dispatch = self.config.dispatch
        self._next_watch = self._now() + min(dispatch.leader_seconds / 3, dispatch.lease_seconds / 4)
        self.store.renew_lead(dispatch.leader_seconds)
        self._retry.succeeded()
        if self._checkpointer.due(self._now()):
            self._publish()
            self._checkpointer.start(Checkpoint.from_federation(self.federation, self._ledger()), self._now())
        for entry in self.store.sweep():
            self._take(entry)
        for client in [client for client in self.federation.clients if not self._verifier.trusts(client)]:
            log.warning("client was revoked", client=client)
            self._handle(ClientLeft(client, keeps_job=True))
        jobs, clients = self.store.find_expired()
        for client in filter(self.store.expire_client, clients):
            log.warning("client is gone", client=client)
            self._handle(ClientLeft(client, keeps_job=True))
        for job in jobs:
            client = self.federation.open_jobs.get(job, "")
            record = abandoned_record(job, client, "lapsed", "", self.federation.version, self._now())
            if client and self.store.close(job, record, self._payload_chunks, if_lapsed=True):
                log.warning("lease is over: job abandoned", job=job, client=client)
                rq_jobs.forget(self.store.redis, self.store.keys.queue(client), job)
                self._handle(JobLapsed(job, client))

    def _take(self, entry: StreamEntry) -> None:
        """One entry of the updates stream, as an event."""
        try:
            event = self._verifier.to_event(entry)
        except WireError as error:
            log.warning("an entry of the updates stream does not count", entry=entry.id, error=str(error))
            arrived = UpdateArrived(entry.id, entry.job, entry.attempt, entry.client, entry.base, entry.body)
            record = rejected_record(arrived, reason_of(error), str(error), self.federation.version, self._now())
            self._note(entry.id, record)
            return
        match event:
            case JobEnded(client=client, reason=reason, error=detail) if detail:
                log.warning("a job ended without an update", client=client, reason=reason, error=detail)
            case ClientJoined(client, examples):
                log.info("client joined", client=client, examples=examples)
            case ClientLeft(client):
                log.info("client left", client=client)
                event = ClientLeft(client, keeps_job=self.store.is_served(client))
            case Evaluated(version, metrics):
                self._note(entry.id, evaluation_record(version, metrics, self._now()))
        self._handle(event)
        if isinstance(event, ClientJoined | ClientLeft):
            self.store.ack(entry.id, None)

    def _handle(self, event: Event) -> None:
        self._do(self.federation.handle(event, self._now()))

    # Actions

    def _do(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Dispatch():
                    if self.config.barrier:
                        self._publish()  # the round that begins trains from it
                    order = make_order(self.config, action)
                    self._failpoint("before dispatch")
                    packed, lease = self.store.pack_order(order), self.config.dispatch.lease_seconds
                    self.store.dispatch(order, packed, self._record(order, packed), action.number, lease)
                case Load():
                    self._load(action)
                case Commit():
                    self._made.append(action)
                    if len(self._made) >= MOST_MADE:
                        self._publish()
                case Close(job, entry, record):
                    self._publish()
                    self._failpoint("before close")
                    taken_back = not entry and record["reason"] in ("returned", "late")
                    closed = self.store.close(job, record, self._payload_chunks, entry, unless_posted=taken_back)
                    if taken_back and not closed and self.store.is_posted(job):
                        self._handle(JobStays(job, record["client"], record["reason"]))
                        continue
                    if not entry:  # no worker has ended it, so RQ may still hold it
                        rq_jobs.forget(self.store.redis, self.store.keys.queue(record["client"]), job)
                    if record["kind"] == "rejected":
                        log.warning("update rejected", client=record["client"], reason=record["reason"])
                case Acknowledge(entry, record):
                    self._note(entry, dict(record) if record else None)
                case Evaluate(version):
                    assert self._evaluator is not None
                    self._publish()
                    self._evaluator.start(version, self.federation.model)
                case Stop(because):
                    self._publish()
                    log.info("stopping", because=because)

    def _record(self, order: Order, packed: bytes) -> rq_jobs.RqJobRecord:
        queue = self.store.keys.queue(order.client)
        return self._queues.record(queue, order, packed if self.store.identity else None)

    @property
    def _payload_chunks(self) -> int:
        return chunks_of(self.federation.up.largest)

    def _load(self, load: Load) -> None:
        arrived = load.arrived
        try:
            delta = self.federation.payloads.receive(self.store, load)
            base = self._base_versions.of(arrived.base) if load.with_base else None
        except (StoreError, WireError) as error:
            self._handle(UpdateUnreadable(load, str(error), unusable_reason(error)))
            return
        self._failpoint("after load")
        try:
            actions = self.federation.handle(UpdateLoaded(load, delta, base), self._now())
        except PayloadChanged as error:
            record = rejected_record(arrived, TAMPERED, str(error), self.federation.version, self._now())
            self._do([Close(arrived.job, arrived.entry, record)])
            raise
        self._do(actions)

    def _publish(self) -> None:
        """Commit the versions that were made: one step for all that came out of the entries read at once.

        Only the last of them is stored. What a worker could see in between is the version before them; and whoever
        goes on after a crash finds none of their updates acknowledged, and makes the same versions again.
        """
        if not self._made:
            return
        federation, made = self.federation, self._made
        merged = [
            StreamEntry(u.entry, "update", u.body, u.client, u.job, u.attempt, u.base) for m in made for u in m.merged
        ]
        self._failpoint("before commit")
        wire = federation.down.encode(federation.model, made[-1].version)
        stored = self.store.publish(
            made[-1].version, wire, as_buffer(federation.optimizer_state),
            [m.record for m in made], federation.totals.committed(), merged, self.config.ledger.keep_payloads,
            federation.job_number, most_bytes(federation),
        )  # fmt: skip
        self._made = []
        self._failpoint("after commit")
        self._base_versions.published(stored, wire)

    def _note(self, entry: str, record: LedgerRecord | None) -> None:
        """Acknowledge an entry; what the ledger says of it comes after the versions that were made before."""
        if record:
            self._publish()
        self.store.ack(entry, record)

    def _report(self, evaluation: Evaluation) -> None:
        """Called on the evaluation's thread. One that an outage swallows is measured again by whoever goes on."""
        try:
            self.store.report("evaluated", evaluation.pack())
        except redis.RedisError as error:
            log.warning("evaluation not reported", error=str(error))

    # The end

    def _end(self) -> RunResult:
        """Close what is open, measure the last version, and leave nothing in Redis but what retention says."""
        federation, store = self.federation, self.store
        assert federation.stopped is not None
        if self._evaluator:
            self._evaluator.join()
        for entry in store.sweep(count=10_000):
            self._take(entry)
        version, model = self._final_version()
        for client in store.registrations():
            rq_jobs.delete_queue(store.redis, store.keys.queue(client))
        ledger, refused, jobs = self._ledger(), store.refused(), store.job_number()
        if self.config.ledger.keep_payloads and not federation.epoch:  # a new epoch begins without the old payloads
            keep_replay(self._folder / REPLAY_FOLDER, self.config, store, ledger, federation.model)
        if self._ending:  # the operator ended it early, and may want to go on after all
            self._checkpointer.start(Checkpoint.from_federation(federation, ledger), self._now())
        else:
            self._checkpointer.delete()
        kept = [0] if self.config.ledger.keep_payloads else []
        most = chunks_of(federation.down.largest)
        store.end(federation.stopped.because, self.config.redis.retention_hours * 3600, most, kept)
        return RunResult(version, model, federation.stopped.because, federation.stopped.failed, ledger, refused, jobs)

    def _ledger(self) -> list[LedgerRecord]:
        ledger, identity = self.store.ledger(), self.store.identity
        self.store.renew_lead(self.config.dispatch.leader_seconds)  # where Redis has lost the run, nothing was read
        if identity and not identity.tells(ledger):
            log.error("the ledger in Redis was changed: it does not tell the versions that were made")
        return ledger

    def _final_version(self) -> tuple[int, Frame]:
        """The version that reached the target, else the newest one, which is evaluated if it has not been."""
        federation, evaluator = self.federation, self._evaluator
        assert federation.stopped is not None
        if evaluator and evaluator.snapshot:
            if federation.stopped.because.startswith("target"):
                return evaluator.snapshot
            if evaluator.snapshot[0] == federation.version:
                return federation.version, federation.model
        if evaluator and not federation.stopped.failed:
            evaluator.start(federation.version, federation.model)
            evaluator.join()
            for entry in self.store.sweep():
                self._take(entry)
        return federation.version, federation.model
