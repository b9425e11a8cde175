"""A federation under a virtual clock: production's state machine, real training, and no waiting for anybody.

One process plays every part. A job trains when its worker would have fetched its base, from that base and with that
job's seed, so its bits are those that a worker would have posted; only when they arrive is computed and not measured:

    arrival = dispatch + job_seconds + batches · batch_seconds · slowdown · noise

So two runs with the same configuration and speeds are the same to the bit, a client that is twenty times slower costs
no time, and what is compared is who waits for whom. What is not simulated: the time that merging, evaluating and
moving a model take, failures of machines, and a worker that serves more than one client.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fedqueue.config.loading import Config
from fedqueue.errors import RunFailed
from fedqueue.local_update import compute_update
from fedqueue.protocol.messages import Order
from fedqueue.task import Task
from fedqueue.tensors.encodings import Bytes
from fedqueue.tensors.error_feedback import ErrorFeedback
from fedqueue.tensors.frame import Frame
from fedqueue.training import choose_device, set_seed
from fedqueue_coordinator.core.dispatch import make_order
from fedqueue_coordinator.core.events import (
    Acknowledge,
    Action,
    ClientJoined,
    Close,
    Commit,
    Dispatch,
    Evaluate,
    Evaluated,
    Event,
    JobEnded,
    Load,
    Stop,
    Tick,
    UpdateArrived,
    UpdateLoaded,
)
from fedqueue_coordinator.core.federation import Federation
from fedqueue_coordinator.core.ledger_records import LedgerRecord, evaluation_record
from fedqueue_coordinator.core.run_summary import RunResult
from fedqueue_coordinator.service.evaluator import evaluate
from fedqueue_coordinator.service.recovery import initial_model


@dataclass(frozen=True)
class TimingModel:
    """How long a job takes, in virtual seconds; `clients.slowdown` of the configuration multiplies the batches."""

    batch_seconds: float = 0.01
    """One batch of local training, on a client that is not slowed down."""
    job_seconds: float = 0.0
    """From the dispatch until training begins: the way of the order and of the base version."""
    jitter: float = 0.0
    """Standard deviation of the logarithm of each job's noise: 0.1 is about 10 %."""

    def training_seconds(self, batches: int, slowdown: float, seed: int) -> float:
        """The duration of a job's training; its noise is log-normal with median 1, drawn by the job's seed."""
        noise = random.Random(seed).lognormvariate(0.0, self.jitter) if self.jitter else 1.0  # nosec B311
        return batches * self.batch_seconds * slowdown * noise


class ClientDatasets:
    """Every client's data, loaded once, and one model that trains them all in turn; it may serve several runs."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.test_data = task.test_data()
        self._data: dict[str, Any] = {}

    def data(self, config: Config, client: str) -> Any:
        """The client's own examples, as its worker would load them."""
        if client not in self._data:
            self._data[client] = self.task.train_data(config.clients.client(client))
        return self._data[client]


@dataclass
class Job:
    """A dispatched job; `base` is the version it trains from, `wire` what it posts, once its worker has begun."""

    order: Order
    base: int = -1
    wire: Bytes | None = None
    left: Frame | None = None
    """What the encoding left out."""


@dataclass(frozen=True)
class TrainingStarted:
    """The worker has fetched the newest version, and trains."""

    job: str


@dataclass(order=True)
class ScheduledEvent:
    """Something that will happen; what happens at the same time does so in the order in which it was planned."""

    seconds: float
    number: int
    what: Event | TrainingStarted = field(compare=False)


class Simulation:
    """One run from its first version to its end."""

    def __init__(
        self,
        config: Config,
        sites: ClientDatasets,
        speeds: TimingModel,
        on_progress: Callable[[Federation, float], None] = lambda federation, now: None,
    ) -> None:
        self.config, self.sites, self.speeds = config, sites, speeds
        self.now = 0.0
        self.ledger: list[LedgerRecord] = []
        self.trace: list[tuple[float, str, str]] = []
        """(seconds, "begins", "arrives" or "waits", job) in the order in which it happened: a real run's script."""
        self._on_progress = on_progress
        self._device = choose_device(config.training.device)
        set_seed(config.seed)
        self._module = sites.task.model()
        first = initial_model(config, self._module)
        self.federation = Federation(config, first, evaluates=sites.test_data is not None)
        self._feedback = ErrorFeedback(self.federation.up)
        self._jobs: dict[str, Job] = {}
        self._versions: dict[int, Frame] = {}  # those that open jobs train from, or that their merge will need
        self._evaluated: tuple[int, Frame] | None = None
        self._agenda: list[ScheduledEvent] = []
        self._planned = 0

    def run(self) -> RunResult:
        """Until the run has ended; raises RunFailed where nothing is left that could happen."""
        federation = self.federation
        for client in self.config.clients.ids:
            examples = self.sites.task.num_examples(self.sites.data(self.config, client))
            self._handle(ClientJoined(client, examples))
        while not federation.stopped:
            deadline = federation.next_deadline()
            if self._agenda and (deadline is None or self._agenda[0].seconds <= deadline):
                moment = heapq.heappop(self._agenda)
                self.now = moment.seconds
                self._happen(moment.what)
            elif deadline is not None:
                self.now = max(self.now, deadline)
                self.trace.append((self.now, "waits", ""))
            else:
                raise RunFailed(f"at {self.now:.1f} virtual seconds nobody trains, and nothing is waited for")
            self._handle(Tick())
            self._on_progress(federation, self.now)
        assert federation.stopped is not None
        version, model = self._final_version(federation.stopped)
        return RunResult(
            version, model, federation.stopped.because, federation.stopped.failed, self.ledger, {},
            federation.job_number,
        )  # fmt: skip

    def _plan(self, seconds: float, what: Event | TrainingStarted) -> None:
        self._planned += 1
        heapq.heappush(self._agenda, ScheduledEvent(seconds, self._planned, what))

    def _happen(self, what: Event | TrainingStarted) -> None:
        match what:
            case TrainingStarted(job):
                if job in self._jobs:
                    self.trace.append((self.now, "begins", job))
                    self._train(self._jobs[job])
            case UpdateArrived(job=job):
                if job in self._jobs:  # else it was closed, and its worker has dropped the work
                    self.trace.append((self.now, "arrives", job))
                    posted = self._jobs[job]
                    assert posted.left is not None
                    self._feedback.accepted(posted.order.client, posted.left)
                    self._handle(what)
            case JobEnded(job=job):
                if job in self._jobs:
                    self._handle(what)
            case _:
                self._handle(what)

    def _handle(self, event: Event) -> None:
        for action in self.federation.handle(event, self.now):
            self._do(action)

    # What workers do

    def _train(self, job: Job) -> None:
        """Train now what arrives later: the base is the newest version of this moment."""
        order, federation = job.order, self.federation
        job.base = federation.version
        if job.base not in self._versions:
            wire = federation.down.encode(federation.model, job.base)
            self._versions[job.base] = federation.down.received(wire)
        base = self._versions[job.base]
        local = Frame(base.manifest)
        batches = 0

        def progress() -> None:
            nonlocal batches
            batches += 1

        data = self.sites.data(self.config, order.client)
        slowdown = self.config.clients.slowdown.get(order.client, 1.0)
        entry = f"{order.job}-arrival"
        try:
            header = compute_update(self.sites.task, self._module, data, order, base, local, progress)
        except Exception as error:  # the task's own: its worker would report it
            seconds = self.speeds.training_seconds(batches, slowdown, order.seed)
            failed = JobEnded(entry, order.job, order.client, "failed", f"{type(error).__name__}: {error}")
            self._plan(self.now + seconds, failed)
            return
        header, job.wire = self._feedback.encode(order.client, local, header, order.seed)
        job.left = local
        seconds = self.speeds.training_seconds(batches, slowdown, order.seed)
        body = header.model_copy(update={"seconds": seconds}).pack()
        self._plan(self.now + seconds, UpdateArrived(entry, order.job, 1, order.client, job.base, body))

    # What the coordinator's surroundings do

    def _do(self, action: Action) -> None:
        match action:
            case Dispatch(job=job):
                self._jobs[job] = Job(make_order(self.config, action))
                self._plan(self.now + self.speeds.job_seconds, TrainingStarted(job))
            case Load(arrived=arrived):
                wire = self._jobs[arrived.job].wire
                assert wire is not None
                delta = self.federation.up.decode(wire)
                base = self._versions[arrived.base] if action.with_base else None
                self._handle(UpdateLoaded(action, delta, base))
            case Commit():
                self.ledger.append(dict(action.record))
                for arrived in action.merged:
                    del self._jobs[arrived.job]
                self._let_go_of_bases()
            case Close(job, _, record):
                self.ledger.append(dict(record))
                self._jobs.pop(job, None)
            case Acknowledge(_, record):
                self.ledger += [dict(record)] if record else []
            case Evaluate(version):
                self._evaluated = version, self.federation.model.copy()
                result = evaluate(self.sites.task, self.sites.test_data, self._evaluated[1], self._device)
                self.ledger.append(evaluation_record(version, result.metrics, self.now))
                self._plan(self.now, Evaluated(version, result.metrics, result.error))
            case Stop():
                pass

    def _let_go_of_bases(self) -> None:
        used = {job.base for job in self._jobs.values()}
        self._versions = {version: frame for version, frame in self._versions.items() if version in used}

    def _final_version(self, stop: Stop) -> tuple[int, Frame]:
        """The version that reached the target, else the newest one, which is evaluated if it has not been."""
        federation = self.federation
        if self._evaluated and stop.because.startswith("target"):
            return self._evaluated
        measured = self._evaluated is not None and self._evaluated[0] == federation.version
        if self.sites.test_data is not None and not stop.failed and not measured:
            self._do(Evaluate(federation.version))
        return federation.version, federation.model
