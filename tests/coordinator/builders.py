"""A model small enough to check by hand, and a run of the state machine whose Redis is a few dictionaries."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from fedqueue.config.loading import Config, parse_config
from fedqueue.protocol.messages import Update
from fedqueue.tensors.frame import BUFFER, COUNTER, PARAMETER, Frame, Manifest, TensorSpec
from fedqueue_coordinator.core.events import (
    Acknowledge,
    Action,
    ClientJoined,
    ClientLeft,
    Close,
    Commit,
    Dispatch,
    Evaluate,
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
from fedqueue_coordinator.core.ledger_records import abandoned_record
from fedqueue_coordinator.core.run_counters import RunCounters

MANIFEST = Manifest(
    (
        TensorSpec("weight", "float32", (2,), 0, 2, PARAMETER),
        TensorSpec("running_mean", "float32", (1,), 2, 1, BUFFER),
        TensorSpec("running_var", "float32", (1,), 3, 1, BUFFER),
        TensorSpec("steps", "int64", (), 0, 1, COUNTER),
    )
)
EXAMPLES = 10
"""What each client registers."""

A = TypeVar("A")


def make_config(**sections: Any) -> Config:
    """A configuration that does not stop by itself; sections are given as dictionaries.

    Unless `aggregation` is given, an update is added as it is: x ← x + Δ.
    """
    tree: dict[str, Any] = {
        "task": {"entrypoint": "task.py:Task"},
        "clients": {"count": 4},
        "aggregation": {"mode": "fedasync", "alpha": 1.0, "mixing": "delta", "staleness": {"function": "constant"}},
        "stop": {"versions": 10_000},
    }
    return parse_config({**tree, **sections})


def make_frame(
    parameters: float | Sequence[float] = 0.0, mean: float = 0.0, variance: float = 1.0, steps: int = 0
) -> Frame:
    """A model, or an update: then `parameters` is the delta, and the others are the local values."""
    frame = Frame(MANIFEST)
    frame.parameters[:] = frame.parameters.new_tensor(np.broadcast_to(np.float32(parameters), 2))
    frame.buffers[0], frame.buffers[1] = mean, variance
    frame.counters[0] = steps
    return frame


def make_header(**fields: Any) -> bytes:
    """The body of an update of the small model."""
    return Update(**{"examples": EXAMPLES, "nbytes": MANIFEST.nbytes, "chunks": 1, "seconds": 0.5, **fields}).pack()


class Died(Exception):
    """The coordinator was killed between two actions."""


@dataclass(frozen=True)
class Committed:
    """What a commit stores."""

    model: Frame
    version: int
    optimizer_state: bytes
    totals: dict[str, Any]

    @classmethod
    def of(cls, federation: Federation) -> Committed:
        return cls(
            federation.model.copy(), federation.version, federation.optimizer_state, federation.totals.committed()
        )

    def federation(self, config: Config, job_number: int, evaluates: bool, ledger: list[dict[str, Any]]) -> Federation:
        return Federation(
            config,
            self.model.copy(),
            self.version,
            job_number,
            self.optimizer_state,
            RunCounters.from_ledger(self.totals, ledger, config.dispatch.share_window),
            evaluates,
        )


class Run:
    """Drives a federation as the service does: loads, commits and closes at once, in the order of the actions.

    On the way it checks what holds of every run: versions rise by one, a job begins once and ends once, and an
    evaluation is of the version that it is labelled with.
    """

    def __init__(self, config: Config, model: Frame, *, evaluates: bool = False) -> None:
        self.config = config
        self.federation = Federation(config, model, evaluates=evaluates)
        self.now = 0.0
        self.actions: list[Action] = []
        """Everything that was carried out, in order."""
        self.holds_loads = False
        self.loads: list[Load] = []
        """With `holds_loads`: payloads on their way, until `load_next`."""
        self.dies_before: int | None = None
        """After so many more actions the coordinator dies: `Died` is raised, and `restart` goes on."""
        # What the store holds
        self.alive: dict[str, int] = {}
        self.registered: dict[str, int] = {}
        self.jobs: dict[str, str] = {}
        """Job → client, from the dispatch until an ending is written down."""
        self.posted: set[str] = set()
        self.stayed: set[str] = set()
        """Jobs of clients that had posted before they left: each was replaced, and is there all the same."""
        self.payloads: dict[str, Frame] = {}
        self.last_jobs: dict[str, int] = {}
        self.versions = {0: model.copy()}
        self.unacknowledged: dict[str, Event] = {}
        self.unread: list[Event] = []
        self.ledger: list[dict[str, Any]] = []
        self.endings: dict[str, str] = {}
        """Job → merged, a reason of rejection, or a reason of abandonment."""
        self.committed = Committed.of(self.federation)
        # Since the federation began
        self._began: tuple[Committed, int, dict[str, str], dict[str, int], dict[str, int]]
        self._began = (self.committed, 0, {}, {}, {})
        self._ledger_before: list[dict[str, Any]] = []
        self.heard: list[tuple[Event, float, list[Action]]] = []
        """Every event with its time and the federation's answer."""
        self._evaluates = evaluates
        self._entries = self._job_number = 0

    # Events

    def tell(self, event: Event) -> list[Action]:
        """Handle the event and what follows from it; returns all actions that this led to."""
        first = len(self.actions)
        answer = self.federation.handle(event, self.now)
        self.heard.append((event, self.now, answer))
        self._do(answer)
        return self.actions[first:]

    def join(self, *clients: str, examples: int = EXAMPLES) -> list[Action]:
        first = len(self.actions)
        for client in clients:
            self.alive[client] = self.registered[client] = examples
            self.tell(ClientJoined(client, examples))
        return self.actions[first:]

    def leave(self, client: str) -> list[Action]:
        self.alive.pop(client, None)
        entry = self._append(ClientLeft(client))
        actions = self.tell(ClientLeft(client))
        del self.unacknowledged[entry]
        return actions

    def vanish(self, client: str) -> list[Action]:
        """The client's aliveness is over; its job, if it has one, keeps its own lease."""
        self.alive.pop(client, None)
        return self.tell(ClientLeft(client, keeps_job=True))

    def tick(self, seconds: float = 0.0) -> list[Action]:
        self.now += seconds
        return self.tell(Tick())

    def has_job(self, client: str) -> bool:
        """Whether a job waits for the client, or it trains on one."""
        return any(of == client and job not in self.posted for job, of in self.jobs.items())

    def job_of(self, client: str) -> str:
        (job,) = [job for job, of in self.jobs.items() if of == client and job not in self.posted]
        return job

    def post(
        self,
        client: str,
        update: Frame | float | Sequence[float] | None = 0.0,
        base: int | None = None,
        body: bytes | None = None,
        unread: bool = False,
        **header: Any,
    ) -> list[Action]:
        """The update of the client's job, trained from version `base` (the newest, unless given); None: no payload.

        With `unread`, it waits in the store until `read`.
        """
        job = self.job_of(client)
        base = self.federation.version if base is None else base
        if update is not None:
            self.payloads[job] = update if isinstance(update, Frame) else make_frame(update)
        self.posted.add(job)
        body = make_header(**header) if body is None else body
        arrived = self._entry(lambda entry: UpdateArrived(entry, job, 1, client, base, body))
        if unread:
            self.unread.append(arrived)
            return []
        return self.tell(arrived)

    def read(self) -> list[Action]:
        """The oldest update that nobody has read yet."""
        return self.tell(self.unread.pop(0))

    def load_next(self) -> list[Action]:
        return self.tell(self._loaded(self.loads.pop(0)))

    def end(self, client: str, reason: str = "failed", error: str = "") -> list[Action]:
        """The worker hands the job back, or the task raised."""
        job = self.job_of(client)
        self.posted.add(job)
        return self.tell(self._entry(lambda entry: JobEnded(entry, job, client, reason, error)))

    def lapse(self, client: str) -> list[Action]:
        """The lease of the client's job is over, and the store has closed the job."""
        job = self.job_of(client)
        self._ended(job, "lapsed")
        self.ledger.append(abandoned_record(job, client, "lapsed", "", self.federation.version, self.now))
        return self.tell(JobLapsed(job, client))

    def stop(self, because: str = "enough") -> list[Action]:
        first = len(self.actions)
        self._do(self.federation.stop(Stop(because), self.now))
        return self.actions[first:]

    def restart(self) -> None:
        """The coordinator dies; a successor goes on from the last commit, and reads what nobody acknowledged."""
        self.dies_before = None
        self.loads = []
        self.unread = []
        self.heard = []
        self._began = (
            self.committed, self._job_number, dict(self.jobs), dict(self.registered), dict(self.last_jobs)
        )  # fmt: skip
        self._ledger_before = list(self.ledger)
        self.federation = self.as_it_began()
        for entry, event in list(self.unacknowledged.items()):
            self.tell(event)
            if isinstance(event, ClientLeft):
                del self.unacknowledged[entry]
        for client, examples in self.alive.items():
            self.tell(ClientJoined(client, examples))

    def as_it_began(self) -> Federation:
        """Another federation in the state in which the present one began."""
        committed, job_number, jobs, registered, last_jobs = self._began
        federation = committed.federation(self.config, job_number, self._evaluates, self._ledger_before)
        federation.restore_jobs(jobs, registered, last_jobs)
        federation.restore_quarantines(self._ledger_before, federation.totals.seconds)
        return federation

    def _append(self, event: Event) -> str:
        self._entries += 1
        entry = f"{self._entries}-0"
        self.unacknowledged[entry] = event
        return entry

    def _entry(self, make: Any) -> Event:
        event = make(f"{self._entries + 1}-0")
        self._append(event)
        return event

    # Actions

    def _do(self, actions: Iterable[Action]) -> None:
        for action in actions:
            if self.dies_before is not None:
                self.dies_before -= 1
                if self.dies_before < 0:
                    raise Died
            self.actions.append(action)
            match action:
                case Dispatch(job, number, client, _):
                    assert job not in self.jobs
                    assert job not in self.endings
                    assert client in self.alive
                    self.jobs[job] = client
                    self._job_number = self.last_jobs[client] = number
                case Load() if self.holds_loads:
                    self.loads.append(action)
                case Load():
                    self.tell(self._loaded(action))
                case Commit():
                    self._commit(action)
                case Close(job, "", record) if record["reason"] in ("returned", "late") and job in self.posted:
                    self.stayed.add(job)
                    self.tell(JobStays(job, record["client"], record["reason"]))
                case Close(job, entry, record):
                    self._ended(job, record["reason"])
                    self.unacknowledged.pop(entry, None)
                    self.ledger.append(dict(record))
                case Acknowledge(entry, record):
                    self.unacknowledged.pop(entry, None)
                    self.ledger += [dict(record)] if record else []
                case Evaluate(version):
                    assert version == self.federation.version
                case Stop():
                    assert self.federation.stopped == action

    def _loaded(self, load: Load) -> UpdateLoaded | UpdateUnreadable:
        if load.arrived.job not in self.payloads:
            return UpdateUnreadable(load, "a chunk is gone", "unreadable")
        base = self.versions[load.arrived.base].copy() if load.with_base else None
        return UpdateLoaded(load, self.payloads[load.arrived.job].copy(), base)

    def _commit(self, commit: Commit) -> None:
        assert commit.version == self.federation.version == max(self.versions) + 1
        for arrived in commit.merged:
            self._ended(arrived.job, "merged")
            del self.unacknowledged[arrived.entry]
        self.versions[commit.version] = self.federation.model.copy()
        self.ledger.append(dict(commit.record))
        self.committed = Committed.of(self.federation)

    def _ended(self, job: str, how: str) -> None:
        self.stayed.discard(job)
        assert job not in self.endings, f"{job} ended as {self.endings[job]}, and now as {how}"
        del self.jobs[job]
        self.endings[job] = how

    # What came of it

    @property
    def x(self) -> float:
        """The first parameter of the newest version."""
        return float(self.federation.model.parameters[0])

    @property
    def merged(self) -> list[dict[str, Any]]:
        """The ledger's lines of merged updates, in order."""
        return [line for record in self.ledger if record["kind"] == "version" for line in record["merged"]]

    @property
    def rejections(self) -> list[str]:
        """Reasons, in order."""
        return [record["reason"] for record in self.ledger if record["kind"] == "rejected"]


def start(*clients: str, model: Frame | None = None, evaluates: bool = False, **sections: Any) -> Run:
    """A run at version 0 (all parameters 0, unless given) with these clients alive."""
    run = Run(make_config(**sections), model or make_frame(), evaluates=evaluates)
    run.join(*clients)
    return run


def of_kind(actions: Iterable[Any], kind: type[A]) -> list[A]:
    return [action for action in actions if isinstance(action, kind)]


def same_bits(first: Frame, second: Frame) -> bool:
    return np.array_equal(first.buffer, second.buffer)
