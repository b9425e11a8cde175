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

In a run with keepers, updates are masked, and `cohorts.py` says which of them are added when:

    a header arrives          → its slot is free at once        → dispatch, then offer the header to the keepers
    every keeper has opened it                                  → load the payload
    the payload is loaded     → weigh it by its staleness now   → add it to the sum
    the cohort is full        → no further payload is loaded    → ask the keepers for the sum of the masks
    every keeper has answered → the server optimizer steps      → commit the new version

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
from fedqueue.protocol.messages import NO_EXAMPLES, Cohort, MaskedUpdate, read
from fedqueue.protocol.signed_envelope import digest_of, unverified_body
from fedqueue.secure.cohort import offer_digest
from fedqueue.secure.ring import ring_of
from fedqueue.tensors.blobs import BlobBuffer
from fedqueue.tensors.codec import downlink_codec, update_codec
from fedqueue.tensors.frame import Delta, Frame
from fedqueue.tensors.manifest import Manifest
from fedqueue_coordinator.algorithms.aggregator import Contribution, Step
from fedqueue_coordinator.algorithms.masked_sum import MaskedSum
from fedqueue_coordinator.algorithms.registry import make_aggregator
from fedqueue_coordinator.algorithms.server_optimizer import ServerOptimizer
from fedqueue_coordinator.core.admission import (
    Inadmissible,
    admit_delta,
    admit_header,
    admit_model,
    admit_offer,
    admit_staleness,
    admit_to_round,
)
from fedqueue_coordinator.core.client_account import ClientAccount
from fedqueue_coordinator.core.cohorts import Cohorts
from fedqueue_coordinator.core.evaluation import MAX_FAILED_EVALUATIONS, EvaluationSchedule
from fedqueue_coordinator.core.events import (
    Acknowledge,
    Action,
    ClientJoined,
    ClientLeft,
    ClientUnavailable,
    Close,
    CloseCondition,
    CohortRefused,
    Commit,
    Evaluate,
    Evaluated,
    Event,
    InvalidEntry,
    JobEnded,
    JobLapsed,
    JobStays,
    KeepersAbsent,
    LeaseExpired,
    Load,
    MaskedUpdateLoaded,
    MasksReleased,
    Offer,
    Stop,
    Tick,
    Unmask,
    UpdateArrived,
    UpdateLoaded,
    UpdateOpened,
    UpdateUnreadable,
)
from fedqueue_coordinator.core.failed_cohorts import ENOUGH, WINDOW, FailedCohorts
from fedqueue_coordinator.core.failures import Failures
from fedqueue_coordinator.core.ledger_records import (
    abandoned_record,
    masked_update,
    merged_update,
    rejected_record,
    spend_record,
    unavailable_record,
    version_record,
)
from fedqueue_coordinator.core.outliers import NormLimit, OutlierFilter
from fedqueue_coordinator.core.reasons import OUTLIER, AbandonReason, RejectionReason
from fedqueue_coordinator.core.run_counters import RunCounters
from fedqueue_coordinator.core.scheduler import Scheduler
from fedqueue_coordinator.core.server_state import AGGREGATION, FILTER, MODEL, OPTIMIZER, load_state, save_state
from fedqueue_coordinator.core.stop_conditions import require_usable_target, stop_reason, target_reached
from fedqueue_coordinator.core.waiting import budgets_end, dead_end, waiting_for

REFUSED_OFFERS = {
    "unmaskable": RejectionReason.UNMASKABLE,
    "keeper_lost": RejectionReason.KEEPER_LOST,
    "foreign": RejectionReason.FOREIGN,
    "model": RejectionReason.WRONG_BASE,
    "spent": RejectionReason.SPENT,
}
"""Why a keeper never takes a mask off → why the update is rejected."""
REFUSED_MEMBERS = {
    "spent": RejectionReason.SPENT,
    "unknown": RejectionReason.KEEPER_LOST,
    "model": RejectionReason.WRONG_BASE,
    "budget": RejectionReason.BUDGET,
}
"""Why a keeper does not release a cohort with certain members → why these are rejected."""


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
        proposed: Cohort | None = None,
    ) -> None:
        """Begin a run with `model`, or resume it from what the last commit stored; then call `restore_jobs`.

        `norms` are those of the updates merged so far, oldest first, if `[admission]` limits the norm by a quantile.
        `proposed` is a cohort that was shown to the keepers and not committed: it is made again as it was.
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
        self.uplink = update_codec(config, model.manifest)
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
        self._cohorts = Cohorts(config, proposed if proposed and proposed.version == version else None)
        self._sum = MaskedSum(self._accumulator, ring_of(config, model.manifest), config) if config.secure.on else None
        self._failed_cohorts = FailedCohorts(config.dispatch.backoff_seconds)
        self._answers: dict[str, Mapping[str, Any]] = {}  # keeper → its release of the cohort under way
        self._refused: dict[str, tuple[RejectionReason, str]] = {}  # its members that a keeper refuses
        self._no_masks: Stop | None = None  # the end of the run, if a keeper refuses every cohort
        self._models: dict[int, str] = {}  # version → digest of the model as published, for those that may be a base
        self._buffer: list[tuple[UpdateArrived, dict[str, Any]]] = []  # with the record of each
        self._arriving: set[str] = set()  # jobs whose update has arrived and is neither merged nor rejected yet
        self._norms = NormLimit(config.admission, norms)
        self._scheduler = Scheduler(config, self.run_counters, epoch, job_number, started=version > 0 or job_number > 0)
        if self._scheduler.started and self.run_counters.started is None:  # before its first commit
            self.run_counters.started = self.run_counters.seconds
        self._account = ClientAccount(config, self.run_counters)
        for client in self._account.used_up():
            self._scheduler.declined(client)
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

    def published(self, version: int, digest: str) -> None:
        """Remember the digest of a version as workers get it, for `MaskedUpdate.model`; older bases are forgotten."""
        self._models[version] = digest
        for old in [v for v in self._models if v < self.version - self.config.aggregation.max_staleness]:
            del self._models[old]

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
                actions += [self._reject(load.arrived, reason, detail, now), *self._load_next(now)]
            case KeepersAbsent() | UpdateOpened() | MaskedUpdateLoaded() | MasksReleased() | CohortRefused():
                actions += self._handle_masked(event, now)
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
        self._release_clients()
        actions += self._dispatch(now)
        if isinstance(event, Tick):
            actions += self._close_if_due(now)
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
        if self._sum and self._cohorts.is_ahead(arrived.client, self.version, arrived.base):
            self._scheduler.hold(arrived.client)
        alone = self._scheduler.arrived(arrived.job, arrived.client, now)
        if self._sum and (offer := self._offer_again(arrived, now)):
            return [offer, *self._load_next(now)]
        if arrived.distrust:
            reason, detail = arrived.distrust
            return [self._reject(arrived, reason, detail, now)]
        self._arriving.add(arrived.job)
        if alone:
            self._alone.add(arrived.job)
        dispatched = self._dispatch(now)
        return [*dispatched, self._admit(arrived, now)]

    def _admit(self, arrived: UpdateArrived, now: float) -> Load | Offer | Close:
        try:
            header = admit_header(
                arrived,
                self.uplink,
                self.version,
                self.config.aggregation.max_staleness,
                self._scheduler.registered.get(arrived.client, 0),
                self.config.barrier,
                self.config.secure.keepers,
                self.config.secure.hides_examples,
            )
            if isinstance(header, MaskedUpdate):
                admit_model(arrived.base, header.model, self._models.get(arrived.base, header.model))
                return self._offer(arrived, header, now)
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
        return self._publish(self._aggregator.finish(self._accumulator, self.model), now)

    def _publish(self, step: Step, now: float, details: Mapping[str, Any] | None = None) -> list[Action]:
        """Make the next version by `step`, from the updates in the buffer; `details` are added to its record."""
        self._optimizer.step(step)
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
            {
                **version_record(self.version, [record for _, record in buffer], now, self._scheduler.take_measured()),
                **(details or {}),
            },
            publish_now=self.config.barrier,
        )
        return [commit, *self._close_round(now)] if self.config.barrier else [commit]

    # The path of a masked update

    def _handle_masked(
        self, event: KeepersAbsent | UpdateOpened | MaskedUpdateLoaded | MasksReleased | CohortRefused, now: float
    ) -> list[Action]:
        match event:
            case KeepersAbsent(keepers):
                self._cohorts.absent(keepers, now)
                return []
            case UpdateOpened():
                return self._open(event, now)
            case MaskedUpdateLoaded():
                return self._add_masked(event, now)
            case MasksReleased():
                return self._unmask(event, now)
            case CohortRefused():
                return self._refuse(event, now)

    def _offer(self, arrived: UpdateArrived, header: MaskedUpdate, now: float) -> Offer:
        """Show the update to the keepers; raises Inadmissible."""
        offer = admit_offer(arrived)
        self._cohorts.offer(offer_digest(offer), arrived, header, now)
        return Offer(arrived, offer)

    def _offer_again(self, arrived: UpdateArrived, now: float) -> Offer | None:
        """Take an update that a former coordinator has checked and put into the cohort that it proposed.

        A client that was revoked since then is so from the next cohort on: a keeper may have released this one.
        """
        try:
            offer = admit_offer(arrived)
        except Inadmissible:
            return None
        if not self._cohorts.is_settled(offer_digest(offer)):
            return None
        self._arriving.add(arrived.job)
        return self._offer(arrived, read(MaskedUpdate, unverified_body(arrived.entry.body)), now)

    def _open(self, opened: UpdateOpened, now: float) -> list[Action]:
        """Load what every keeper can unmask, and reject what one of them cannot.

        A keeper that is offered an update again refuses what it has released as spent, also of the cohort under way:
        there, its answer to the cohort counts.
        """
        update = self._cohorts.opened(opened.offer, opened.keeper)
        if update is None:
            return []
        if opened.refusal and self._cohorts.is_settled(opened.offer):
            update.refusal = opened
        elif opened.refusal and not self._cohorts.is_member(opened.offer):
            return [self._reject_unopened(update.arrived, opened, now), *self._load_next(now)]
        elif opened.refusal and not self._cohorts.under_way:
            return self._expel(opened, now)
        return self._load_next(now)

    def _reject_unopened(self, arrived: UpdateArrived, refused: UpdateOpened, now: float) -> Close:
        detail = f"keeper {refused.keeper}: {refused.detail}"
        return self._reject(arrived, REFUSED_OFFERS[refused.refusal], detail, now)

    def _expel(self, refused: UpdateOpened, now: float) -> list[Action]:
        """Reject a member of the coming cohort; the others are added again."""
        self._cohorts.give_back(self._cohorts.take_members())
        self._discard_sum()
        return self._open(refused, now)

    def _load_next(self, now: float) -> list[Action]:
        """Load the next update that may become a member of the coming cohort."""
        actions: list[Action] = []
        while update := self._cohorts.next(self.version):
            base = update.arrived.base
            try:
                if self.config.barrier:
                    admit_to_round(base, self.version)
                admit_staleness(base, self.version, self.config.aggregation.max_staleness)
                if not self._cohorts.is_settled(update.digest):  # its cohort was charged, or is lighter than before
                    load = self._cohorts.load(update.arrived.client, update, self.version)
                    self._account.admit(update.arrived.client, load)
            except Inadmissible as verdict:
                actions.append(self._reject(update.arrived, verdict.reason, verdict.detail, now))
                continue
            return [*actions, Load(update.arrived, update.header, with_base=False)]
        return actions

    def _add_masked(self, loaded: MaskedUpdateLoaded, now: float) -> list[Action]:
        """Add a masked update to the sum, and ask for the masks once its cohort is full."""
        assert self._sum
        arrived, header, update = loaded.load.arrived, loaded.load.header, self._cohorts.loading
        assert update
        staleness, level = self.version - arrived.base, self._cohorts.weight(update, self.version)
        self._sum.add(loaded.masked.pieces(), level, header.examples, staleness)
        self._cohorts.add(level)
        self._arriving.discard(arrived.job)
        self._scheduler.merged(arrived.client)
        weight = level / self.config.secure.weight_levels
        record = masked_update(
            arrived, header, update.digest, staleness=staleness, level=level, weight=weight, seconds=now
        )
        self._buffer.append((arrived, record))
        return [self._propose(now)] if self._cohorts.is_full else self._load_next(now)

    def _propose(self, now: float) -> Unmask:
        self._answers, self._refused = {}, {}
        cohort, loads = self._cohorts.propose(self.version, now), self._cohorts.loads()
        digest = digest_of(cohort.pack())
        if not self._account.charge(digest, loads):
            return Unmask(cohort)
        return Unmask(cohort, spend_record(self.version + 1, digest, self._account.statement(loads), now))

    def _unmask(self, released: MasksReleased, now: float) -> list[Action]:
        """Take a keeper's masks off the sum; once all are off, make the next version from it."""
        assert self._sum
        if not self._cohorts.awaits(released.keeper):
            return []
        self._answers[released.keeper] = released.sealed
        if not self._refused:
            self._sum.subtract(released.masks.pieces())
        if not self._cohorts.answered(released.keeper):
            return []
        return self._break_up(now) if self._refused else self._make_masked_version(released.cohort, now)

    def _make_masked_version(self, cohort: str, now: float) -> list[Action]:
        assert self._sum
        loads, members = self._cohorts.loads(), self._cohorts.take_members()
        self._decline_used_up()
        if problem := self._sum.problem():
            self._discard_sum()
            return [*self._reject_cohort([member.update.arrived for member in members], problem, now),
                    *self._load_next(now)]  # fmt: skip
        self._failed_cohorts.succeeded(member.update.arrived.client for member in members)
        masks = {keeper: dict(self._answers[keeper]) for keeper in self.config.secure.keepers}
        step = self._sum.finish(self._aggregator, self.model)
        self._sum.clear()
        details = {"cohort": cohort, "masks": masks, "trained_from": self._models.get(self.version, "")}
        if privacy := self._account.statement(loads):
            details["privacy"] = privacy
        return [*self._publish(step, now, details), *self._load_next(now)]

    def _decline_used_up(self) -> None:
        """Give no further job to clients whose next update would not fit into their budgets."""
        for client in self._account.used_up():
            self._scheduler.declined(client)

    def _reject_cohort(self, members: Sequence[UpdateArrived], detail: str, now: float) -> list[Action]:
        """Reject the members of a cohort whose sum is too long; a client that was in most such cohorts rests."""
        rests = self._failed_cohorts.failed(arrived.client for arrived in members)
        self._scheduler.restore_rests({client: now + seconds for client, seconds in rests.items()})
        notes = {
            client: f"; {client} was in at least {ENOUGH} of the last {WINDOW} such cohorts, and rests for "
            f"{seconds:g} s: a statistic, and no proof"
            for client, seconds in rests.items()
        }
        return [
            self._reject(arrived, RejectionReason.COHORT_NORM, detail + notes.get(arrived.client, ""), now)
            for arrived in members
        ]

    def _refuse(self, refused: CohortRefused, now: float) -> list[Action]:
        """Note which members a keeper refuses; what becomes of the others depends on the answers of the other keepers.

        A refusal that is about no member ends the run: the keeper would refuse any other cohort, too.
        """
        if not self._cohorts.awaits(refused.keeper):
            return []
        reason = REFUSED_MEMBERS.get(refused.reason)
        named = [offer for offer in refused.offers if self._cohorts.is_member(offer)]
        if reason is None or not named:
            why = f"keeper {refused.keeper} releases no masks for version {self.version + 1}"
            self._no_masks = Stop(f"{why} ({refused.reason}): {refused.detail}", failed=True)
            return []
        self._refused.update(dict.fromkeys(named, (reason, f"keeper {refused.keeper}: {refused.detail}")))
        return self._break_up(now) if self._cohorts.answered(refused.keeper) else []

    def _break_up(self, now: float) -> list[Action]:
        """Reject the members that a keeper refused; the others wait for the next cohort.

        If another keeper has released this cohort, all its members are spent. In the next cohort they would be refused
        there, while the first keeper released what is new in it, and so on for ever.
        """
        members = self._cohorts.take_members()
        self._decline_used_up()
        self._discard_sum()
        self._cohorts.give_back(members)
        released = ", ".join(self._answers)
        spent = RejectionReason.SPENT, f"keeper {released} has released its mask in a cohort that another one refused"
        rejected = [
            self._reject(member.update.arrived, *why, now)
            for member in members
            if (why := self._refused.get(member.update.digest, spent if released else None))
        ]
        return [*rejected, *self._load_next(now)]

    def _discard_sum(self) -> None:
        """Empty the sum of a cohort that becomes no version."""
        assert self._sum
        self._sum.clear()
        self._arriving.update(arrived.job for arrived, _ in self._buffer)
        self._buffer = []

    def _release_clients(self) -> None:
        """Let clients train again whose updates the coming version takes."""
        if not (self._sum and self._scheduler.held):
            return
        for client in self._cohorts.caught_up(self._scheduler.held, self.version):
            self._scheduler.release(client)

    def _keeper_away(self, now: float) -> Stop | None:
        """End the run where a keeper has been awaited for longer than it may be."""
        longest, awaited = self._longest_wait, self._cohorts.awaited
        if longest is None or awaited is None or now < longest:
            return None
        seconds = f"{self.config.secure.wait_seconds:g} s (secure.wait_seconds)"
        what = "answer" if self._cohorts.has_begun(awaited[0]) else "join the run"
        return Stop(f"keeper {awaited[0]} did not {what} for {seconds}", failed=True)

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
    def awaits_keepers(self) -> bool:
        """Whether a keeper has not answered an `Offer` or an `Unmask` yet."""
        return self._cohorts.awaited is not None

    @property
    def awaited_keeper(self) -> tuple[str, float] | None:
        """The keeper that has been awaited for longest, and since when, on the run's clock; None without any."""
        return self._cohorts.awaited

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
        """Job → client for every job that is open, or whose update is buffered or waits for a keeper."""
        posted = [*self._cohorts.arrived, *(arrived for arrived, _ in self._buffer)]
        return {**self.open_jobs, **{arrived.job: arrived.client for arrived in posted}}

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
            self._longest_wait,
        ]
        return min((end for end in ends if end is not None), default=None)

    def waiting_for(self, now: float) -> str:
        """Describe what keeps the run from dispatching a job; an empty string if it goes on."""
        return waiting_for(self.config, self._scheduler, self.unavailable, now, self._cohorts)

    def dead_end(self, gone: Container[str]) -> str:
        """Describe why the run can never go on, if no client in `gone` comes back; an empty string if it can."""
        return dead_end(self.config, self._scheduler, gone, self.unavailable)

    @property
    def _time_limit(self) -> float | None:
        """Time at which stop.seconds have passed since the clients began to train, or None."""
        started, seconds = self.run_counters.started, self.config.stop.seconds
        return None if started is None or seconds is None else started + seconds

    @property
    def _longest_wait(self) -> float | None:
        """Time at which a keeper has been awaited for secure.wait_seconds, or None."""
        limit = self.config.secure.wait_seconds
        awaited = None if limit is None else self._cohorts.awaited
        return None if limit is None or awaited is None else awaited[1] + limit

    # Slots

    def _dispatch(self, now: float) -> list[Action]:
        if self._sum is None:
            return [*self._scheduler.dispatch(len(self._arriving), len(self._buffer), now)]
        arriving = len(self._arriving) - self._cohorts.left_over(self.version)
        return [*self._scheduler.dispatch(arriving, len(self._buffer), now, self._cohorts.backlog)]

    def _pass_on(self, job: str, client: str, now: float) -> list[Action]:
        """Give the slot of a job that ended to another client, or to this one if no other is idle."""
        self._scheduler.lost(job, client)
        actions = self._dispatch(now)
        self._scheduler.offer(client)
        return actions

    def _close_if_due(self, now: float) -> list[Action]:
        """Make a version from a part of a buffer, if that is all that can come."""
        if self._sum:
            return self._propose_if_due(now)
        if not self._round_closes(now):
            return []
        actions = self._commit(now)
        return actions + self._dispatch(now)

    def _propose_if_due(self, now: float) -> list[Action]:
        """Ask for the masks of a cohort that no client can add to, with lower weights if it is no crowd with these.

        All updates of a resumed run have been read by now: a former coordinator's cohort that lacks one never comes.
        """
        if self._cohorts.is_incomplete:
            return self._give_up_settled(now)
        if loads := self._load_next(now):
            return loads
        ends = not self.open_jobs and budgets_end(self.config, self._scheduler)
        if self._cohorts.may_grow(self.version) or (self._scheduler.can_train and not ends):
            return []
        if self._cohorts.is_crowd:
            return [self._propose(now)]
        if not self._cohorts.level_down():
            return []
        members = self._cohorts.take_members()
        self._discard_sum()
        self._cohorts.give_back(members)
        return self._load_next(now)

    def _give_up_settled(self, now: float) -> list[Action]:
        """Let the members of a former coordinator's cohort wait for others; what a keeper has released is spent."""
        refused = self._cohorts.unsettle()
        self._discard_sum()
        rejected = [self._reject_unopened(arrived, refusal, now) for arrived, refusal in refused]
        return [*rejected, *self._load_next(now)]

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
        self._cohorts.drop(arrived.job)
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
        if ended.final:
            self._scheduler.declined(ended.client)
            return [close, *self._pass_on(ended.job, ended.client, now)]
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
            text = f": {worst.line}" if worst else ""
            if self._scheduler.declining and self.version:
                why = budgets_end(self.config, self._scheduler) or "no site trains further jobs"
                return self.stop(Stop(f"{why}{text}"), now)
            return self.stop(Stop(f"every client failed too often and was set aside{text}", failed=True), now)
        if ending := ending or self._no_masks or self._keeper_away(now) or self._budgets_end():
            return self.stop(ending, now)
        started = self.run_counters.started
        trained = None if started is None else now - started
        because = stop_reason(self.config.stop, self.version, self.run_counters.updates, trained)
        return self.stop(self._end_at(because), now) if because else []

    def _budgets_end(self) -> Stop | None:
        """End the run once the clients that still train can make no further version, or already with the first budget.

        What the keepers have been asked about is merged first.
        """
        used_up = self._account.used_up()
        if used_up and self.config.privacy.clients.on_budget == "stop" and not self._cohorts.under_way:
            return Stop(f"the privacy budget of {used_up[0]} is used up (privacy.clients.on_budget)")
        if not (self._sum and self.version and self._scheduler.declining):
            return None
        if self.open_jobs or self._cohorts.may_grow(self.version) or self._cohorts.is_crowd:
            return None
        why = budgets_end(self.config, self._scheduler)
        worst = self.failures.most_frequent
        return Stop(why + (f": {worst.line}" if worst else "")) if why else None

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
            for arrived in [*self._cohorts.arrived, *(arrived for arrived, _ in self._buffer)]
        ]
        self._buffer = []
        self._cohorts.take_members()
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
            case UpdateLoaded(load=load) | MaskedUpdateLoaded(load=load) | UpdateUnreadable(load=load):
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
