"""Translates stream entries into events and carries out the returned actions in Redis.

The federation decides; this module makes no decision about a client, a job or an update. It decides how Redis is
used: how many versions one commit has (`MAX_VERSIONS_PER_COMMIT`), how long a read waits, and when leases, checkpoints
and lost notifications are checked (`_watch`). It also keeps the ledger in the order of the actions: before an action
that appends a record, it commits the versions that were made before.

After a crash or a lost reply, the next coordinator re-reads every unacknowledged entry; the scripts are idempotent.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import redis
import structlog
import torch

from fedqueue.config.schema import Config
from fedqueue.errors import BlobMissing, Fenced, RunLost, ServerUnavailable, StoreError, WireError
from fedqueue.protocol.messages import Evaluation, Order
from fedqueue.protocol.stream_entry import StreamEntry
from fedqueue.task import Task
from fedqueue.tensors.blobs import chunks_of
from fedqueue.tensors.frame import Frame
from fedqueue.tracing import NO_TRACING, Tracing
from fedqueue.training import check_device
from fedqueue.transport import rq_jobs
from fedqueue.transport.connection import eviction_note, refusal
from fedqueue.transport.retry import RedisRetry, transient_reason
from fedqueue_coordinator.algorithms.registry import check_algorithms
from fedqueue_coordinator.core.admission import unusable_reason
from fedqueue_coordinator.core.evaluation import load_test_data, require_test_data
from fedqueue_coordinator.core.events import (
    Acknowledge,
    Action,
    ClientJoined,
    ClientLeft,
    ClientUnavailable,
    Close,
    CloseCondition,
    Commit,
    Dispatch,
    Evaluate,
    Evaluated,
    Event,
    JobLapsed,
    JobStays,
    LeaseExpired,
    Load,
    MaskedUpdateLoaded,
    Offer,
    Stop,
    Tick,
    Unmask,
    UpdateLoaded,
    UpdateUnreadable,
    make_order,
)
from fedqueue_coordinator.core.federation import Federation
from fedqueue_coordinator.core.lapses import lapse_cause
from fedqueue_coordinator.core.ledger_records import LedgerRecord, evaluation_record, rejected_record
from fedqueue_coordinator.core.observer import RunObserver
from fedqueue_coordinator.core.reasons import AbandonReason, RejectionReason
from fedqueue_coordinator.core.run_summary import RunResult
from fedqueue_coordinator.service.checkpoint import CHECKPOINT_FILENAME, Checkpoint, Checkpointer, load_checkpoint
from fedqueue_coordinator.service.coordinator_store import CoordinatorStore
from fedqueue_coordinator.service.entry_verifier import EntryVerifier
from fedqueue_coordinator.service.evaluator import Evaluator
from fedqueue_coordinator.service.keeper_exchange import KeeperExchange
from fedqueue_coordinator.service.leader_election import LeaseRenewal, acquire_leadership
from fedqueue_coordinator.service.lease_watch import LeaseWatch
from fedqueue_coordinator.service.masked_words import read_masked_update
from fedqueue_coordinator.service.memory_watch import MemoryWatch
from fedqueue_coordinator.service.payload_reader import BaseVersions, PayloadChanged, PayloadReader
from fedqueue_coordinator.service.portions import TOGETHER, log_events, log_gone, portions
from fedqueue_coordinator.service.publication import publish_newest
from fedqueue_coordinator.service.recovery import restore_federation
from fedqueue_coordinator.service.replay_archive import REPLAY_FOLDER, keep_replay
from fedqueue_coordinator.service.update_traces import UpdateTraces

log = structlog.get_logger("fedqueue.coordinator")

MAX_VERSIONS_PER_COMMIT = 32  # versions in one commit
LAPSED_TOGETHER = 16  # jobs whose lease has ended, in one round of the loop
MAX_WAIT_SECONDS = 1.0  # seconds; a read ends at once when an entry arrives, this bounds how long a signal waits


class Coordinator:
    """Leads one run over Redis to its end, from its beginning or from the last commit of another coordinator."""

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
        on_wait: Callable[[], None] = lambda: None,
        reopen: bool = False,
        owns_folder: Callable[[], bool] = lambda: True,
        deliver_ended: bool = False,
        observer: RunObserver | None = None,
        tracing: Tracing = NO_TRACING,
    ) -> None:
        """`folder` is for the checkpoint and for kept payloads, which are written only if `owns_folder` returns true.

        `failpoint` is called with the name of each crash point under test.
        `on_progress` gets the federation and the seconds of the run's clock after each round of the loop;
        `on_wait` is called before each wait for Redis. With `reopen`, a run that has ended is continued from the
        checkpoint. With `deliver_ended`, `run` returns the result of a run that has ended in Redis again, as its
        coordinator may have died before it wrote the results. `observer` is told what the ledger gets, after Redis has
        it. `tracing` makes a span for each dispatch, merge and version. Raises ConfigurationError for an algorithm that
        cannot be made, and for a target without test data to measure it on.
        """
        self.config = config
        self.task = task
        self.store = store
        self._folder = folder
        self._on_progress = on_progress
        self._clock = clock
        self._sleep = sleep
        self._failpoint = failpoint
        self._zero = clock()  # of the run's clock
        self._next_watch = 0.0
        self._ending: Stop | None = None
        self._paused = False
        self._known = False  # whether this process has seen the run in Redis
        self._unreported: Evaluation | None = None  # an evaluation that an outage of Redis kept from the stream
        self._unreported_because = ""
        self._unpublished: list[Commit] = []  # versions that are not in Redis yet
        self._handled: list[tuple[str, Mapping[str, Any] | None]] = []  # entries to acknowledge, with their records
        self._checkpointer = Checkpointer(folder / CHECKPOINT_FILENAME, config.checkpoint.every_seconds)
        self._verifier = EntryVerifier(store.identity)
        self._retry = RedisRetry(self._told_to_stop, sleep)
        self._memory = MemoryWatch(store.redis)
        self._on_wait = on_wait
        self._observer = observer or RunObserver()
        self._traces = UpdateTraces(tracing)
        self._reopen = reopen
        self._owns_folder, self._deliver_ended = owns_folder, deliver_ended
        self._ended_before = False  # whether the run had ended in Redis before this process led it
        self.federation: Federation
        self._payloads: PayloadReader
        self._base_versions: BaseVersions
        self._keepers: KeeperExchange | None  # None in a run without keepers
        self._queues: rq_jobs.Queues
        self._returning: deque[str]  # clients that the coordinator before this one knew
        self._leases: LeaseWatch
        self._clients_due: bool  # whether the lease watch has more clients to check at once
        self._lapsed_jobs: deque[str]  # jobs whose lease has ended, to close
        torch.set_num_threads(config.aggregation.threads)
        check_algorithms(config)
        data = load_test_data(task)
        require_test_data(config.stop.target, data)
        device = check_device(config.training.device)
        self._evaluator = None if data is None else Evaluator(task, data, device, self._report, config.seed)

    def interrupt(self, because: str) -> None:
        """End the run soon, keeping the model so far. Safe to call from a signal handler."""
        self._ending = Stop(because)

    def fail(self, because: str) -> None:
        """End the run soon, as failed. Safe to call from a signal handler."""
        self._ending = Stop(because, failed=True)

    @property
    def interrupted(self) -> bool:
        """Whether `interrupt` was called."""
        return self._ending is not None and not self._ending.failed

    @property
    def paused(self) -> bool:
        """Whether `pause` was called."""
        return self._paused

    def pause(self) -> None:
        """Stop leading soon; another coordinator can resume the run. Safe to call from a signal handler."""
        self._paused = True

    def run(self, standby: bool = False) -> RunResult | None:
        """Lead the run until it has ended; returns None if it was paused.

        After an outage of Redis, this coordinator resumes the run as another one would. With `standby`, it waits for as
        long as another coordinator leads. Raises Fenced if another coordinator has taken over, ServerUnavailable for an
        outage that waiting cannot end, RunExists if another one leads and `standby` is false, and RunLost if the run is
        gone and no checkpoint exists.
        """
        while True:
            try:
                return self._lead(standby)
            except redis.RedisError as error:
                self._observer.lost_connection()
                self._require_time_left(error)
                self._on_wait()
                self._retry.wait(error)
            except PayloadChanged as error:
                log.error("payload changed during merge; restarting from the last commit", error=str(error))
            except Fenced:
                if not (lost := self._retry.call(self._lost_from_redis)):
                    raise
                log.warning(lost)

    def _lost_from_redis(self) -> str:
        """What Redis has lost of the run, so that this coordinator was fenced without another one that leads."""
        if not self.store.exists():
            return "run missing from Redis; restarting from the checkpoint"
        if not self.store.has_leader_key():
            return "leader key missing from Redis: another program has deleted it; leading the run again"
        return ""

    def _told_to_stop(self) -> bool:
        return self._paused or self._ending is not None

    def _require_time_left(self, error: redis.RedisError) -> None:
        """Raise ServerUnavailable if stop.seconds have passed in an outage, which only the federation would notice."""
        limit, because = self.config.stop.seconds, transient_reason(error)
        started = (self.federation.run_counters.started if self._known else None) or 0.0
        if limit is not None and because and self._now() >= started + limit:
            raise ServerUnavailable(
                f"stop.seconds = {limit:g} have passed while waiting for Redis: {because}"
            ) from error

    @property
    def checkpoint_saved(self) -> bool:
        """Whether the checkpoint has the version with which the run ended."""
        return self._checkpointer.saved == self.federation.version

    def _lead(self, standby: bool) -> RunResult | None:
        """Acquire the leader lease, and lead until the run ends, is paused, or an error occurs."""
        try:
            acquired = acquire_leadership(
                self.store, self.config, self._checkpointer.path, self._known, standby, self._told_to_stop, self._sleep
            )
            if not acquired:
                return None
            with LeaseRenewal(self.store.renew_lead, self.config.dispatch.leader_lease_seconds):
                self._resume()
                self._loop()
                return None if self._paused else self._end()
        finally:
            if self._evaluator:
                self._evaluator.join()
            self._checkpointer.join()
            with contextlib.suppress(redis.RedisError):
                self.store.release_lead()

    def _resume(self) -> None:
        """Begin or resume the run: restore the federation, then read every entry that no commit has acknowledged."""
        store = self.store
        if self._reopen and store.has_ended() and self._checkpointer.path.exists():
            store.clear()
        self._ended_before = store.has_ended()
        if store.has_remains():
            self._delete_remains("its head or its configuration is missing")
        checkpoint = None if store.exists() else load_checkpoint(self._checkpointer.path)
        try:
            self.federation = restore_federation(
                self.config,
                store,
                self.task,
                checkpoint,
                self._evaluator is not None,
                self._verifier,
                self._memory,
                ended_too=self._deliver_ended or self._known,  # this process may have ended it, and lost the reply
            )
        except BlobMissing as error:
            self._delete_remains(str(error))
            raise Fenced(str(error)) from error
        resumed = self._clock() - self.federation.run_counters.seconds
        self._zero = min(self._zero, resumed) if self._known else resumed  # the time of an outage counts
        self._known = True
        self._next_watch = self._now()
        self._unpublished, self._handled = [], []
        self._unreported = None  # measured again: the federation knows of no evaluation in progress
        self._leases = LeaseWatch()
        self._clients_due, self._lapsed_jobs = False, deque()
        self._observer.begins(self.federation, self._now())
        self._queues = rq_jobs.Queues(store.redis)
        store.read_first(self.federation.busy)
        self._keepers = None
        if self.config.secure.on:
            self._keepers = KeeperExchange(store, self.config.secure.keepers, self.federation.uplink.nbytes)
        self._payloads = PayloadReader(store, self.federation)
        self._base_versions = BaseVersions(store, self.federation)
        for order in store.unstarted_orders():
            store.enqueue(self._rq_record(order, store.pack_order(order)))  # no change if RQ has the job
        known = store.clients()
        alive = store.served(known)
        self._returning = deque(sorted(known, key=lambda client: client not in alive))
        # An update that no commit has acknowledged is of an open job.
        self._take(store.unacknowledged({*self.federation.open_jobs.values(), *self._next_returning()}))
        self._let_return()

    def _next_returning(self) -> list[str]:
        return list(itertools.islice(self._returning, TOGETHER))

    def _let_return(self) -> None:
        """Let a portion of the clients return that the coordinator before this one knew; the first are alive.

        A signature takes 0.1 ms to verify, so a hundred thousand clients return while updates are merged.
        """
        some = self._next_returning()
        valid = self._verifier.valid_registrations(self.store.registrations_of(some))
        self.federation.restore_jobs({}, valid)
        alive = self.store.served(list(valid))
        for client in some:
            self._returning.popleft()
            if client in alive and client not in self.federation.clients:
                self._handle(ClientJoined(client, valid[client]))

    def _delete_remains(self, missing: str) -> None:
        """Delete what Redis has kept of a run that cannot be resumed; raises RunLost if there is no checkpoint."""
        note = "; ".join(filter(None, [missing, eviction_note(self.store.redis)]))
        if not self._checkpointer.path.exists() and self.store.has_configuration():
            cause = f"{note}; `fedqueue remove {self.config.name}` deletes what is left of it"
            raise RunLost(self.config.name, self._checkpointer.path, cause)
        log.warning("Redis has lost a part of the run: deleting the rest", because=note)
        self.store.clear()

    def _loop(self) -> None:
        """Read entries and handle them, until the run ends or is paused."""
        while not (self.federation.stopped or self._paused):
            self._publish()
            entries = self.store.receive(self._wait_seconds())
            self.store.expect_payloads(entries[1:], self.federation.uplink)
            self._take(entries)
            self._hear_keepers()
            self._watch()
            self._handle(Tick())
            if self._ending and not self.federation.stopped:
                self._perform(self.federation.stop(self._ending, self._now()))
            self._on_progress(self.federation, self._now())
            self._observer.progressed(self.federation, self._now())

    # Events

    def _hear_keepers(self) -> None:
        """Handle the absence of keepers, and their answers, if any are awaited."""
        if not self._keepers:
            return
        for event in self._keepers.absences():
            self._handle(event)
        if self.federation.awaits_keepers:
            for event in self._keepers.answers():
                self._handle(event)

    def _now(self) -> float:
        """Seconds of the run's clock."""
        return self._clock() - self._zero

    def _wait_seconds(self) -> float:
        """Longest time that the next read waits for an entry."""
        now = self._now()
        more = now if self._returning or self._clients_due or self._lapsed_jobs else None
        ends = [now + MAX_WAIT_SECONDS, self._next_watch, self.federation.next_deadline(), more]
        return max(0.001, min(end for end in ends if end is not None) - now)

    def _watch(self) -> None:
        """From time to time: renew the lead, save a checkpoint, read streams, and find what has expired.

        Many leases may end at once. Each round of the loop ends a portion of them, so that updates wait no longer.
        """
        if self._now() >= self._next_watch:
            dispatch = self.config.dispatch
            self._next_watch = self._now() + min(dispatch.leader_lease_seconds / 3, dispatch.lease_seconds / 4)
            self.store.renew_lead(dispatch.leader_lease_seconds, self.federation.waiting_for(self._now()))
            self._retry.succeeded()
            if use := self._memory.look(self._now(), self.federation.uplink.largest):
                self._observer.measured_memory(use.used, use.limit)
            if (evaluation := self._unreported) is not None:
                self._unreported = None
                self._report(evaluation)
            if self._checkpointer.due(self._now()) and self._owns_folder():
                self._publish()
                ledger = self._ledger()
                if damage := self._damage_of(ledger):  # the checkpoint before has the whole ledger
                    self.fail(damage)
                else:
                    self._checkpointer.start(Checkpoint.from_federation(self.federation, ledger), self._now())
            self._take(self.store.sweep_some(self.federation.open_jobs.values()))
            self._clients_due = True
            self._lapsed_jobs = deque(self.store.find_expired())
        if self._returning:
            self._let_return()
        if self._clients_due:
            self._check_clients()
        if not self._clients_due:  # else a job might pass to a client that is gone too
            self._end_lapsed_jobs()

    def _check_clients(self) -> None:
        """Let the clients leave that are revoked or whose lease has ended, among some of those whose check is due."""
        due, lease = self._leases.due(self._now(), TOGETHER), self.config.dispatch.lease_seconds
        self._clients_due = len(due) == TOGETHER
        leases = self.store.client_leases(due, lease) if due else {}
        revoked, ended = [], []
        for client in due:
            left = leases.get(client, lease)  # without a lease, an entry that it has left is on its way
            if not self._verifier.trusts(client):
                revoked.append(client)
            elif not left:
                ended.append(client)
            else:
                self._leases.set(client, self._now() + left)
        expired = self.store.expire_clients(ended) if ended else []
        for client in {*ended}.difference(expired):  # renewed meanwhile
            self._leases.set(client, self._now())
        log_gone(revoked, expired)
        for client in [*revoked, *expired]:
            self._handle(ClientLeft(client, announced=False))

    def _end_lapsed_jobs(self) -> None:
        """Close a portion of the jobs whose lease has ended."""
        for _ in range(min(len(self._lapsed_jobs), LAPSED_TOGETHER)):
            job = self._lapsed_jobs.popleft()
            if holder := self.federation.open_jobs.get(job):
                cause, why = lapse_cause(self.store.last_report(job, holder), self.config.dispatch)
                self._handle(LeaseExpired(job, cause, f"{cause}: {why}"))

    def _take(self, entries: Iterable[StreamEntry]) -> None:
        """Handle stream entries in their order."""
        for portion in portions(entries):
            self._take_portion(portion)

    def _take_portion(self, portion: Sequence[StreamEntry]) -> None:
        """Handle entries that are acknowledged together.

        The federation, or the commit of a version, acknowledges the entry of an update or of a job's ending. The
        entries of other events are acknowledged here, with the record of a finished evaluation.
        """
        events = [self._verifier.to_event(entry) for entry in portion]
        log_events(events)
        gone = [event.client for event in events if isinstance(event, ClientLeft | ClientUnavailable)]
        served = self.store.served(gone) if gone else set()
        for entry, event in zip(portion, events, strict=True):
            match event:
                case ClientLeft(client) | ClientUnavailable(client=client):
                    self._handle(dataclasses.replace(event, served=client in served))
                case Evaluated():  # recorded before the end of the run, to which it may lead
                    self._acknowledge(entry.id, evaluation_record(event, self._now()))
                    self._handle(event)
                case _:
                    self._handle(event)
            if isinstance(event, ClientJoined | ClientLeft):
                self._acknowledge(entry.id, None)
        self._settle()

    def _handle(self, event: Event) -> None:
        """Pass the event to the federation and carry out its actions; then likewise the events they result in."""
        match event:
            case ClientJoined(client):
                self._leases.set(client, self._now())
            case ClientLeft(client) | ClientUnavailable(client=client, served=False):
                self._leases.discard(client)
        events = deque([event])
        while events:
            events.extend(self._perform(self._actions_for(events.popleft())))

    def _actions_for(self, event: Event) -> list[Action]:
        try:
            return self.federation.handle(event, self._now())
        except PayloadChanged as error:
            # The accumulator contains a part of the payload: close the job, and let `run` restart from the last commit.
            if not isinstance(event, UpdateLoaded | MaskedUpdateLoaded):
                raise
            arrived, version = event.load.arrived, self.federation.version
            record = rejected_record(arrived, RejectionReason.TAMPERED, str(error), version, self._now())
            self._perform([Close(arrived.job, arrived.entry.id, record)])
            raise

    # Actions

    def _perform(self, actions: Iterable[Action]) -> list[Event]:
        """Carry out the actions in order; return the events that they result in."""
        outcomes = [self._perform_one(action) for action in actions]
        return [event for event in outcomes if event is not None]

    def _perform_one(self, action: Action) -> Event | None:
        match action:
            case Dispatch():
                self._dispatch(action)
            case Load():
                return self._load(action)
            case Offer():
                assert self._keepers
                self._keepers.offer(action)
            case Unmask():
                self._propose(action)
            case Commit():
                self._unpublished.append(action)
                if action.publish_now or len(self._unpublished) >= MAX_VERSIONS_PER_COMMIT:
                    self._publish()
            case Close():
                return self._close(action)
            case Acknowledge(entry, record):
                self._acknowledge(entry, record)
            case Evaluate(version):
                assert self._evaluator is not None
                self._publish()
                self._evaluator.start(version, self.federation.model)
            case Stop(because):
                self._publish()
                log.info("stopping", because=because)
        return None

    def _dispatch(self, dispatch: Dispatch) -> None:
        order = self._traces.dispatching(make_order(self.config, dispatch))
        packed = self.store.pack_order(order)
        self._failpoint("before dispatch")
        lease = self.config.dispatch.lease_seconds
        self.store.dispatch(order, packed, self._rq_record(order, packed), dispatch.number, lease)
        self._observer.dispatched()

    def _rq_record(self, order: Order, packed: bytes) -> rq_jobs.RqJobRecord:
        queue = self.store.keys.queue(order.client)
        return self._queues.record(queue, order, packed if self.store.identity else None)

    def _propose(self, unmask: Unmask) -> None:
        """Ask the keepers for masks, after the version that the cohort is merged into is committed."""
        assert self._keepers
        self._publish()
        self._failpoint("before propose")
        self._keepers.propose(unmask.cohort, unmask.record)
        log.debug("cohort proposed", version=unmask.cohort.version, updates=len(unmask.cohort.members))
        self._failpoint("after propose")

    def _load(self, load: Load) -> UpdateLoaded | MaskedUpdateLoaded | UpdateUnreadable:
        self._traces.reading(load.arrived)
        try:
            if self.config.secure.on:
                masked = read_masked_update(self.store, self.federation, load)
                self._observer.received(load.header.nbytes)
                return MaskedUpdateLoaded(load, masked)
            delta = self._payloads.read(load)
            self._observer.received(load.header.nbytes)
            base = self._base_versions.frame(load.arrived.base) if load.with_base else None
        except (StoreError, WireError) as error:
            return UpdateUnreadable(load, unusable_reason(error), str(error))
        self._failpoint("after load")
        return UpdateLoaded(load, delta, base)

    def _close(self, close: Close) -> JobStays | JobLapsed | None:
        """Close the job in the store, and remove it from RQ unless its worker ended it."""
        store = self.store
        reason, client = close.record["reason"], close.record["client"]
        self._publish()
        self._settle()
        self._failpoint("before close")
        closed = store.close(
            close.job,
            close.record,
            chunks_of(self.federation.uplink.largest),
            close.entry,
            if_lapsed=close.only_if == CloseCondition.LAPSED,
            unless_posted=close.only_if == CloseCondition.UNPOSTED,
        )
        if self._keepers and closed:
            self._keepers.ended([close.job])
        if close.only_if == CloseCondition.LAPSED and not closed:
            return None
        if close.only_if == CloseCondition.UNPOSTED and not closed and store.is_posted(close.job):
            return JobStays(close.job, client, AbandonReason(reason))
        if closed:
            self._observer.recorded(close.record)
            self._traces.closed(close.record)
        if not close.entry:
            rq_jobs.forget(store.redis, store.keys.queue(client), close.job)
        if close.record["kind"] == "rejected":
            log.info("update rejected", client=client, reason=reason, detail=close.record["detail"])
        if close.lapse_cause:
            why = close.record["error"]
            log.info("lease of job expired: job abandoned", job=close.job, client=client, because=why)
            return JobLapsed(close.job, client, close.lapse_cause, why)
        return None

    def _acknowledge(self, entry: str, record: Mapping[str, Any] | None) -> None:
        """Let the portion's end acknowledge an entry that ends no job.

        Its ledger record follows the versions that were made before, and precedes every later record.
        """
        if record:
            self._publish()
        self._handled.append((entry, record))

    def _settle(self) -> None:
        """Acknowledge the entries that have been handled, and send the offers of updates, each in one step."""
        if self._keepers:
            self._keepers.send()
        if self._handled:
            handled, self._handled = self._handled, []
            self.store.ack(handled)
            for _, record in handled:
                if record:
                    self._observer.recorded(record)

    def _publish(self) -> None:
        """Commit the versions that were made since the last time, in one step.

        Only the last of them is stored: until now, workers have seen the version before them. After a crash before this
        commit, no update in them is acknowledged, so the next coordinator makes the same versions again.
        """
        if not self._unpublished:
            return
        self._settle()
        self._failpoint("before commit")
        stored, wire = publish_newest(self.store, self.federation, self._unpublished)
        log.debug("version committed", version=self.federation.version, made=len(self._unpublished))
        if self._keepers:
            self._keepers.committed(arrived.job for commit in self._unpublished for arrived in commit.merged)
        for commit in self._unpublished:
            self._observer.recorded(commit.record)
            self._traces.committed(commit)
        self._unpublished = []
        self._failpoint("after commit")
        self._base_versions.keep_stored(stored, wire)

    def _report(self, evaluation: Evaluation) -> None:
        """Append an evaluation to the coordinator's own stream; called on the evaluator's thread.

        A result that does not reach Redis is reported again by `_watch`.
        """
        try:
            self.store.report("evaluated", evaluation.pack())
        except redis.RedisError as error:
            self._unreported = evaluation
            if (why := transient_reason(error) or refusal(error)) != self._unreported_because:
                log.warning("evaluation not reported; it is reported again after the outage", because=why)
            self._unreported_because = why
        else:
            self._unreported_because = ""

    # The end

    def _end(self) -> RunResult:
        """Settle the entries that are left, evaluate the last version, and leave in Redis what retention requires.

        A run that is resumable stays in Redis as it is, for the next coordinator.
        """
        federation, store, stopped = self.federation, self.store, self.federation.stopped
        assert stopped is not None
        seconds = self._now()
        keep_payloads = self.config.ledger.keep_payloads
        if self._evaluator:
            self._evaluator.join()
        self._take(store.sweep(count=10_000))
        version, model = self._final_version()
        ledger = self._ledger()
        if damage := self._damage_of(ledger):
            log.error(damage)
            stopped = Stop(damage, failed=True)
        registered = store.registrations().keys()
        if not stopped.resumable:
            for client in store.last_jobs():  # no other client has a queue
                rq_jobs.delete_queue(store.redis, store.keys.queue(client))
        refused = store.refused()
        jobs = store.job_number()
        owned = self._owns_folder()
        if keep_payloads and not federation.epoch and owned and not damage:  # a later epoch lacks the former payloads
            try:
                keep_replay(self._folder / REPLAY_FOLDER, self.config, store, ledger, federation.model)
            except OSError as error:
                log.error("payloads not kept, so the audit cannot replay the run; check the disk", error=str(error))
                shutil.rmtree(self._folder / REPLAY_FOLDER, ignore_errors=True)
        if damage or not owned or self._ended_before:  # the newest checkpoint was saved with the whole ledger
            self._checkpointer.join()
        elif self._ending or stopped.failed:  # the operator may want to continue it after all
            self._checkpointer.start(Checkpoint.from_federation(federation, ledger), self._now())
        else:
            self._checkpointer.delete()
        if not stopped.resumable:
            store.end(
                stopped.because,
                self.config.redis.retention_hours * 3600,
                chunks_of(federation.downlink.largest),
                [0] if keep_payloads else [],
                self.config.secure.keepers,
                stopped.failed,
            )
        return RunResult(
            version, model, stopped.because, stopped.failed, ledger, refused, jobs,
            registered=frozenset(registered), seconds=seconds, resumable=stopped.resumable,
        )  # fmt: skip

    def _ledger(self) -> list[LedgerRecord]:
        """Read the whole ledger; raises Fenced if Redis has lost the run and its ledger."""
        ledger = self.store.ledger()
        self.store.renew_lead(self.config.dispatch.leader_lease_seconds)
        return ledger

    def _damage_of(self, ledger: list[LedgerRecord]) -> str:
        """Say what is wrong with a ledger that is not that of the committed versions; all versions are published."""
        versions = [record["version"] for record in ledger if record["kind"] == "version"]
        identity, expected = self.store.identity, range(1, self.federation.version + 1)
        if versions == list(expected) and (identity is None or identity.matches_history(ledger)):
            return ""
        if not (missing := len(set(expected) - set(versions))):
            return "the ledger in Redis does not match the committed versions: run `fedqueue audit`"
        why = eviction_note(self.store.redis) or "another program has deleted them"
        return f"the records of {missing} of {self.federation.version} versions are missing from the ledger: {why}"

    def _final_version(self) -> tuple[int, Frame]:
        """Return the version that reached the target, else the newest one; evaluate that if it has not been."""
        federation, evaluator = self.federation, self._evaluator
        assert federation.stopped is not None
        if evaluator and evaluator.snapshot:
            if federation.stopped.version == evaluator.snapshot[0]:
                return evaluator.snapshot
            if evaluator.snapshot[0] == federation.version:
                return federation.version, federation.model
        if evaluator and not federation.stopped.failed and not self._ended_before:  # else it has been evaluated
            evaluator.start(federation.version, federation.model)
            evaluator.join()
            self._take(self.store.sweep())
        return federation.version, federation.model
