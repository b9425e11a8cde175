"""Simulates a federation under a virtual clock: the coordinator's own state machine and real training, without waiting.

    result = Simulation(config, ClientDatasets(task), TimingModel(batch_seconds=0.02)).run()
    result.model, result.ledger, result.stopped_because

Everything happens in this process. A job trains when its worker would have fetched its base, from that base and with
the seed of that job, so its update has the bits that a worker would have posted. Only its arrival is computed, in
seconds:

    arrival = dispatch + job_seconds + batches · batch_seconds · slowdown · noise

Two simulations with the same configuration, data and timing therefore give the same bits, and a client that is twenty
times slower takes no longer to simulate.

With [privacy.examples], the noise of a job follows from the configuration's seed, so that a simulation can be repeated,
and each client's spending begins at zero.

Not simulated: the time that merging, evaluation and the transfer of models take, failures of machines, and a worker
that serves more than one client.
"""

from __future__ import annotations

import heapq
import random
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import structlog

from fedqueue.config.schema import Config
from fedqueue.errors import BudgetSpent, NoExamples, RunFailed
from fedqueue.exception_text import exception_with_place
from fedqueue.local_model import LocalModel
from fedqueue.local_update import compute_update, load_data
from fedqueue.privacy.spending import Spending, charge_of_job, countable_rows, over_epsilon_of_run
from fedqueue.private_training import check_example_privacy, simulated_key
from fedqueue.protocol.messages import NO_EXAMPLES, Order
from fedqueue.protocol.signed_envelope import digest_of
from fedqueue.protocol.stream_entry import StreamEntry
from fedqueue.task import Task, make_model
from fedqueue.tensors.encodings import Bytes
from fedqueue.tensors.error_feedback import ErrorFeedback
from fedqueue.tensors.frame import Frame
from fedqueue.training import check_device, check_training, set_seed
from fedqueue_coordinator.core.evaluation import evaluate, load_test_data, require_test_data
from fedqueue_coordinator.core.events import (
    Acknowledge,
    Action,
    ClientJoined,
    ClientUnavailable,
    Close,
    Commit,
    Dispatch,
    Evaluate,
    Evaluated,
    Event,
    JobEnded,
    Load,
    MaskedUpdateLoaded,
    MasksReleased,
    Offer,
    Stop,
    Tick,
    Unmask,
    UpdateArrived,
    UpdateLoaded,
    WholeWords,
    make_order,
)
from fedqueue_coordinator.core.federation import Federation, initial_model
from fedqueue_coordinator.core.ledger_records import LedgerRecord, evaluation_record
from fedqueue_coordinator.core.observer import RunObserver
from fedqueue_coordinator.core.reasons import AbandonReason
from fedqueue_coordinator.core.run_summary import RunResult
from fedqueue_coordinator.simulation.simulated_keepers import SimulatedKeepers

log = structlog.get_logger("fedqueue.coordinator")


@dataclass(frozen=True)
class TimingModel:
    """The duration of a job in virtual seconds; the key clients.slowdown multiplies the time of its batches."""

    batch_seconds: float = 0.01
    """Seconds per batch of local training, on a client with slowdown 1."""
    job_seconds: float = 0.0
    """Seconds from the dispatch until training begins: the transfer of the order and of the base version."""
    jitter: float = 0.0
    """Standard deviation of the logarithm of each job's noise; 0.1 is about 10 %, and 0 switches the noise off."""

    def training_seconds(self, batches: int, slowdown: float, seed: int) -> float:
        """Return the seconds that `batches` take, with log-normal noise of median 1 drawn with the job's `seed`."""
        noise = random.Random(seed).lognormvariate(0.0, self.jitter) if self.jitter else 1.0  # nosec B311
        return batches * self.batch_seconds * slowdown * noise


class ClientDatasets:
    """The data of every client of a task, loaded once; several simulations may share it.

    `task.test_data()` is called at once, and `task.train_data(client)` when a client's data is first used. Simulations
    that share an instance must have the same [clients], because the data is kept by client id.
    """

    def __init__(self, task: Task) -> None:
        """Raises TaskError if `test_data` raises."""
        self.task = task
        self.test_data = load_test_data(task)
        self._data: dict[str, tuple[Any, int | None]] = {}

    def data(self, config: Config, client: str) -> tuple[Any, int | None]:
        """Return what `task.train_data` returns for the client, as its worker would load it, and its examples.

        Raises NoExamples for a client without examples.
        """
        if client not in self._data:
            self._data[client] = load_data(self.task, config.clients.client(client), config.seed)
        return self._data[client]


@dataclass
class Job:
    """A dispatched job."""

    order: Order
    base: int = -1
    """The version that it trains from; −1 before training begins."""
    wire: Bytes | None = None
    """The encoded update that it posts; None before training begins."""
    residual: Frame | None = None
    """What the encoding left out of the update, for error feedback; None for a masked update."""


@dataclass(frozen=True)
class TrainingStarted:
    """The event that a worker has fetched the newest version and begins to train."""

    job: str


@dataclass(order=True)
class ScheduledEvent:
    """An event at a virtual time; events of the same time are ordered by `number`, the order of scheduling."""

    seconds: float
    number: int
    event: Event | TrainingStarted = field(compare=False)


class Simulation:
    """One run, from version 0 until a condition of [stop] is met; `run` may be called once.

    The sections [redis], [security] and [checkpoint] of `config` have no effect. Times such as stop.seconds are virtual
    seconds. The constructor seeds torch's global random generator with config.seed and builds the model.
    `on_progress(federation, now)` is called after each event, with `now` in virtual seconds. `on_payload(job, attempt,
    payload)` is called with each update that the coordinator loads, as it was posted, and `on_masks(cohort, keeper,
    masks)` with each sum of masks that a keeper releases. `observer` is told what the ledger gets.
    """

    def __init__(
        self,
        config: Config,
        datasets: ClientDatasets,
        timing: TimingModel,
        on_progress: Callable[[Federation, float], None] = lambda federation, now: None,
        on_payload: Callable[[str, int, Bytes], None] = lambda job, attempt, payload: None,
        on_masks: Callable[[str, str, Bytes], None] = lambda cohort, keeper, masks: None,
        observer: RunObserver | None = None,
    ) -> None:
        self.config, self.datasets, self.timing = config, datasets, timing
        self.now = 0.0
        """Virtual seconds since the start."""
        self.ledger: list[LedgerRecord] = []
        self.trace: list[tuple[float, str, str]] = []
        """(virtual seconds, "begins" | "arrives" | "waits", job) in order, with which a real run can be driven."""
        self._on_progress, self._on_payload, self._on_masks = on_progress, on_payload, on_masks
        self._observer = observer or RunObserver()
        require_test_data(config.stop.target, datasets.test_data)
        self._device = check_device(config.training.device)
        set_seed(config.seed)
        module = make_model(datasets.task)
        first = initial_model(config, module)
        check_training(config.training, self._device, module)
        check_example_privacy(config.privacy.examples, datasets.task, module)
        self.spent: dict[str, Spending] = {}
        """What each client's rows have been used for, with [privacy.examples]."""
        self._model = LocalModel(datasets.task, module, first.manifest)
        self.federation = Federation(config, first, evaluates=datasets.test_data is not None)
        self._feedback = ErrorFeedback(self.federation.uplink)
        self._keepers = SimulatedKeepers(config, first.manifest) if config.secure.on else None
        self._digests: dict[int, str] = {}  # of the base versions of open jobs, in a run with keepers
        self._jobs: dict[str, Job] = {}
        self._versions: dict[int, Frame] = {}  # the base versions of open jobs
        self._users: Counter[int] = Counter()  # version → open jobs that train from it
        self._evaluated: tuple[int, Frame] | None = None
        self._events: list[ScheduledEvent] = []
        self._scheduled = 0

    def run(self) -> RunResult:
        """Simulate until the run has ended.

        The result has the model (the version that reached the target, else the newest), whose `state_dict()` has the
        names, shapes and dtypes of the task's own model, and the ledger, whose times are virtual seconds. Raises
        RunFailed if no event is left before a stop condition is met, for example because too few clients are left.
        """
        federation = self.federation
        self._observer.begins(federation, self.now)
        for client in self.config.clients.ids:
            try:
                data, examples = self.datasets.data(self.config, client)
                if self.config.example_privacy:
                    countable_rows(data)
            except NoExamples:
                log.warning("client left out: it has no examples", client=client)
                self._handle(ClientUnavailable(f"{client}-left-out", client, NO_EXAMPLES))
            else:
                self._handle(ClientJoined(client, 0 if self.config.secure.hides_examples else examples))
        while not federation.stopped:
            deadline = federation.next_deadline()
            if self._events and (deadline is None or self._events[0].seconds <= deadline):
                scheduled = heapq.heappop(self._events)
                self.now = scheduled.seconds
                self._process(scheduled.event)
            elif deadline is not None:
                self.now = max(self.now, deadline)
                self.trace.append((self.now, "waits", ""))
            else:
                raise RunFailed(
                    f"the run stalled at {self.now:.1f} virtual seconds: no client trains, no deadline is open"
                )
            self._handle(Tick())
            self._on_progress(federation, self.now)
        assert federation.stopped is not None
        version, model = self._final_version(federation.stopped)
        return RunResult(
            version, model, federation.stopped.because, federation.stopped.failed, self.ledger, {},
            federation.job_number, registered=frozenset(federation.clients),
            seconds=self.now, resumable=federation.stopped.resumable,
        )  # fmt: skip

    def _schedule(self, seconds: float, event: Event | TrainingStarted) -> None:
        self._scheduled += 1
        heapq.heappush(self._events, ScheduledEvent(seconds, self._scheduled, event))

    def _process(self, event: Event | TrainingStarted) -> None:
        match event:
            case TrainingStarted(job):
                if job in self._jobs:
                    self.trace.append((self.now, "begins", job))
                    self._train(self._jobs[job])
            case UpdateArrived(job=job):
                if job in self._jobs:  # otherwise the job was closed, and its worker has dropped the update
                    self.trace.append((self.now, "arrives", job))
                    posted = self._jobs[job]
                    if posted.residual is not None:
                        self._feedback.accepted(posted.order.client, posted.residual)
                    self._handle(event)
            case JobEnded(job=job):
                if job in self._jobs:
                    self._handle(event)
            case _:
                self._handle(event)

    def _handle(self, event: Event) -> None:
        events = deque([event])
        while events:
            for action in self.federation.handle(events.popleft(), self.now):
                events.extend(self._perform(action))

    # The workers

    def _train(self, job: Job) -> None:
        """Train a job on the newest version and schedule the arrival of its update."""
        order, federation = job.order, self.federation
        job.base = federation.version
        self._users[job.base] += 1
        if job.base not in self._versions:
            wire = federation.downlink.encode(federation.model, job.base)
            self._versions[job.base] = federation.downlink.received(wire)
            self._versions[job.base].frozen = federation.model.frozen
            if self._keepers:
                self._digests[job.base] = digest_of(wire)
                federation.published(job.base, self._digests[job.base])
        base = self._versions[job.base]
        local = Frame(base.manifest)
        data, _ = self.datasets.data(self.config, order.client)
        progress = self._model.progress(self.config.clients.client(order.client), job.base, lambda: None)
        slowdown = self.config.clients.slowdown.get(order.client, 1.0)
        entry = f"{order.job}-arrival"
        try:
            noise_key = self._paid_noise_key(order, data)
            header = compute_update(self.datasets.task, self._model, data, order, base, local, progress, noise_key)
            if self._keepers:
                header, job.wire = self._keepers.mask(header, local, order, job.base, self._digests[job.base])
        except BudgetSpent as error:
            refused = JobEnded(entry, order.job, order.client, AbandonReason.REFUSED, str(error), final=True)
            self._schedule(self.now, refused)
            return
        except (Exception, SystemExit) as error:  # an error in the task, which a worker would report
            seconds = self.timing.training_seconds(progress.batches, slowdown, order.seed)
            failed = JobEnded(entry, order.job, order.client, AbandonReason.FAILED, exception_with_place(error))
            self._schedule(self.now + seconds, failed)
            return
        if not self._keepers:
            header, job.wire = self._feedback.encode(order.client, local, header, order.seed)
            job.residual = local
        seconds = self.timing.training_seconds(progress.batches, slowdown, order.seed)
        body = header.model_copy(update={"seconds": seconds}).pack()
        self._schedule(
            self.now + seconds,
            UpdateArrived(StreamEntry(entry, "update", body, order.client, order.job, 1, job.base), body),
        )

    def _paid_noise_key(self, order: Order, data: Any) -> bytes:
        """Charge the client for a job whose rows are protected, as its site would; returns the key of the job's noise.

        Raises BudgetSpent where the run's ε is used up.
        """
        if order.privacy is None:
            return b""
        charge = charge_of_job(order.privacy, order.training, countable_rows(data))
        before = self.spent.get(order.client, Spending())
        after = before.plus(order.run, charge)
        if why := over_epsilon_of_run(order.run, order.client, before, after, order.privacy):
            raise BudgetSpent(why)
        self.spent[order.client] = after
        return simulated_key(self.config.seed, order)

    # The service around the state machine

    def _perform(self, action: Action) -> list[Event]:
        """Carry the action out; return the events that it results in."""
        match action:
            case Dispatch(job=job):
                self._jobs[job] = Job(make_order(self.config, action))
                self._schedule(self.now + self.timing.job_seconds, TrainingStarted(job))
            case Load(arrived=arrived):
                wire = self._jobs[arrived.job].wire
                assert wire is not None
                self._on_payload(arrived.job, arrived.attempt, wire)
                if self._keepers:
                    return [MaskedUpdateLoaded(action, WholeWords(wire.view(np.uint32)))]
                delta = self.federation.uplink.decode(wire)
                base = self._versions[arrived.base] if action.with_base else None
                return [UpdateLoaded(action, delta, base)]
            case Offer() | Unmask():
                assert self._keepers
                if isinstance(action, Unmask) and action.record:
                    self._record(action.record)
                answers = self._keepers.answer(action)
                for said in answers:
                    if isinstance(said, MasksReleased) and isinstance(said.masks, WholeWords):
                        self._on_masks(said.cohort, said.keeper, said.masks.words.view(np.uint8))
                return answers
            case Commit():
                self._record(action.record)
                for arrived in action.merged:
                    self._forget(arrived.job)
            case Close(job, _, record):
                self._record(record)
                self._forget(job)
            case Acknowledge(_, record):
                if record:
                    self._record(record)
            case Evaluate(version):
                self._evaluated = version, self.federation.model.copy()
                data = self.datasets.test_data
                result = evaluate(self.datasets.task, data, self._evaluated[1], self._device, self.config.seed)
                evaluated = Evaluated(version, result.metrics, result.error)
                self._record(evaluation_record(evaluated, self.now))
                self._schedule(self.now, evaluated)
            case Stop():
                pass
        return []

    def _record(self, record: Mapping[str, Any]) -> None:
        self.ledger.append(dict(record))
        self._observer.recorded(record)

    def _forget(self, name: str) -> None:
        """Forget a job that has ended, and its base version unless another open job trains from that."""
        job = self._jobs.pop(name, None)
        if job is None or job.base < 0:
            return
        self._users[job.base] -= 1
        if not self._users[job.base]:
            del self._users[job.base], self._versions[job.base]
            self._digests.pop(job.base, None)

    def _final_version(self, stop: Stop) -> tuple[int, Frame]:
        """Return the version that reached the target, else the newest, and evaluate it if that has not happened."""
        federation = self.federation
        if self._evaluated and stop.version == self._evaluated[0]:
            return self._evaluated
        measured = self._evaluated is not None and self._evaluated[0] == federation.version
        if self.datasets.test_data is not None and not stop.failed and not measured:
            self._perform(Evaluate(federation.version))
        return federation.version, federation.model
