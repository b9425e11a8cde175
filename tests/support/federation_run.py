"""Runs the coordinator's state machine with a few dictionaries as its store."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from fedqueue.config.schema import Config
from fedqueue.protocol.stream_entry import StreamEntry
from fedqueue.tensors.frame import Frame
from fedqueue_coordinator.core.events import (
    Acknowledge,
    Action,
    ClientJoined,
    ClientLeft,
    Close,
    CloseCondition,
    Commit,
    Dispatch,
    Evaluate,
    Event,
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
from fedqueue_coordinator.core.federation import Federation
from fedqueue_coordinator.core.reasons import AbandonReason, LapseCause, RejectionReason
from fedqueue_coordinator.core.run_counters import RunCounters
from tests.support.builders import EXAMPLES, make_config, make_frame, make_header


def make_arrived(
    entry: str, job: str, client: str, base: int, body: bytes, distrust: tuple[RejectionReason, str] | None = None
) -> UpdateArrived:
    """Make the event of an unsigned update that arrives from the first attempt of a job."""
    return UpdateArrived(StreamEntry(entry, "update", body, client, job, 1, base), body, distrust)


class Died(Exception):
    """The coordinator is killed between two actions."""


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
            federation.model.copy(), federation.version, federation.optimizer_state, federation.run_counters.committed()
        )

    def counters(self, ledger: list[dict[str, Any]], window: int) -> RunCounters:
        return RunCounters.from_ledger(self.totals, ledger, window)

    def federation(self, config: Config, job_number: int, evaluates: bool, ledger: list[dict[str, Any]]) -> Federation:
        return Federation(
            config,
            self.model.copy(),
            self.version,
            job_number,
            self.optimizer_state,
            self.counters(ledger, config.dispatch.share_window),
            evaluates,
        )


class Run:
    """Drives a federation as the service does: carries out loads, commits and closes at once and in order.

    It checks three invariants of every run: versions rise by one, a job begins once and ends once, and an evaluation
    measures the version in its label.
    """

    def __init__(self, config: Config, model: Frame, *, evaluates: bool = False) -> None:
        self.config = config
        self.federation = Federation(config, model, evaluates=evaluates)
        self.now = 0.0
        self.actions: list[Action] = []
        """All actions that were carried out, in order."""
        self.holds_loads = False
        self.loads: list[Load] = []
        """With `holds_loads`: payloads on their way, until `load_next`."""
        self.dies_before: int | None = None
        """Number of further actions after which the coordinator dies: `Died` is raised, and `restart` resumes."""
        # Contents of the store
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
        # Recorded since this federation object was made
        self._began: tuple[Committed, int, dict[str, str], dict[str, int], dict[str, int]]
        self._began = (self.committed, 0, {}, {}, {})
        self._ledger_before: list[dict[str, Any]] = []
        self.handled: list[tuple[Event, float, list[Action]]] = []
        """Every event with its time and the federation's answer."""
        self._evaluates = evaluates
        self._entries = self._job_number = 0

    # Events

    def tell(self, event: Event) -> list[Action]:
        """Handle the event and the events that result from it; return all actions."""
        first = len(self.actions)
        events = deque([event])
        while events:
            event = events.popleft()
            answer = self.federation.handle(event, self.now)
            self.handled.append((event, self.now, answer))
            events.extend(self._perform(answer))
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
        """Expire the client's lease; the client's job, if any, keeps its own lease."""
        self.alive.pop(client, None)
        return self.tell(ClientLeft(client, announced=False))

    def tick(self, seconds: float = 0.0) -> list[Action]:
        self.now += seconds
        return self.tell(Tick())

    def has_job(self, client: str) -> bool:
        """Whether the client has a job without a posted update."""
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
        """Post the update of the client's job, trained from version `base` (default: newest); None posts no payload.

        With `unread`, the update stays in the store until `read`.
        """
        job = self.job_of(client)
        base = self.federation.version if base is None else base
        if update is not None:
            self.payloads[job] = update if isinstance(update, Frame) else make_frame(update)
        self.posted.add(job)
        body = make_header(**header) if body is None else body
        arrived = self._entry(lambda entry: make_arrived(entry, job, client, base, body))
        if unread:
            self.unread.append(arrived)
            return []
        return self.tell(arrived)

    def read(self) -> list[Action]:
        """Read the oldest unread update."""
        return self.tell(self.unread.pop(0))

    def load_next(self) -> list[Action]:
        return self.tell(self._loaded(self.loads.pop(0)))

    def end(self, client: str, reason: str = "failed", error: str = "", final: bool = False) -> list[Action]:
        """End the job without an update: the worker hands the job back, refuses it, or the task raises."""
        job = self.job_of(client)
        self.posted.add(job)
        return self.tell(self._entry(lambda entry: JobEnded(entry, job, client, AbandonReason(reason), error, final)))

    def lapse(self, client: str, cause: LapseCause = LapseCause.PROCESS_DIED) -> list[Action]:
        """Expire the lease of the client's job; return the actions after the job is closed."""
        close, *actions = self.tell(LeaseExpired(self.job_of(client), cause))
        assert isinstance(close, Close)
        return actions

    def stop(self, because: str = "enough") -> list[Action]:
        first = len(self.actions)
        for event in self._perform(self.federation.stop(Stop(because), self.now)):
            self.tell(event)
        return self.actions[first:]

    def restart(self) -> None:
        """Resume from the last commit after a crash, and read the unacknowledged entries."""
        self.dies_before = None
        self.loads = []
        self.unread = []
        self.handled = []
        self._began = (
            self.committed, self._job_number, dict(self.jobs), dict(self.registered), dict(self.last_jobs)
        )  # fmt: skip
        self._ledger_before = list(self.ledger)
        self.federation = self.restored_twin()
        for entry, event in list(self.unacknowledged.items()):
            self.tell(event)
            if isinstance(event, ClientLeft):
                del self.unacknowledged[entry]
        for client, examples in self.alive.items():
            self.tell(ClientJoined(client, examples))

    def restored_twin(self) -> Federation:
        """Restore another federation to the state in which the present one began."""
        committed, job_number, jobs, registered, last_jobs = self._began
        federation = committed.federation(self.config, job_number, self._evaluates, self._ledger_before)
        federation.restore_jobs(jobs, registered, last_jobs)
        federation.restore_quarantines(self._ledger_before, federation.run_counters.seconds)
        return federation

    def _append(self, event: Event) -> str:
        self._entries += 1
        entry = f"{self._entries}-0"
        self.unacknowledged[entry] = event
        return entry

    def _entry(self, make: Callable[[str], Event]) -> Event:
        event = make(f"{self._entries + 1}-0")
        self._append(event)
        return event

    # Actions

    def _perform(self, actions: Iterable[Action]) -> list[Event]:
        """Carry out the actions in order; return the resulting events."""
        outcomes: list[Event] = []
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
                    outcomes.append(self._loaded(action))
                case Commit():
                    self._commit(action)
                case Close(job, _, record, CloseCondition.UNPOSTED) if job in self.posted:
                    self.stayed.add(job)
                    outcomes.append(JobStays(job, record["client"], AbandonReason(record["reason"])))
                case Close(job, entry, record, _, cause):
                    self._ended(job, record["reason"])
                    self.unacknowledged.pop(entry, None)
                    self.ledger.append(dict(record))
                    if cause:
                        outcomes.append(JobLapsed(job, record["client"], cause, record["error"]))
                case Acknowledge(entry, record):
                    self.unacknowledged.pop(entry, None)
                    self.ledger += [dict(record)] if record else []
                case Evaluate(version):
                    assert version == self.federation.version
                case Stop():
                    assert self.federation.stopped == action
                case _:
                    outcomes += self._ask_keepers(action)
        return outcomes

    def _ask_keepers(self, action: Action) -> list[Event]:
        raise AssertionError(f"{action} in a run without keepers")

    def _loaded(self, load: Load) -> Event:
        if load.arrived.job not in self.payloads:
            return UpdateUnreadable(load, RejectionReason.UNREADABLE, "a chunk is gone")
        base = self.versions[load.arrived.base].copy() if load.with_base else None
        return UpdateLoaded(load, self.payloads[load.arrived.job].copy(), base)

    def _commit(self, commit: Commit) -> None:
        assert commit.version == self.federation.version == max(self.versions) + 1
        for arrived in commit.merged:
            self._ended(arrived.job, "merged")
            del self.unacknowledged[arrived.entry.id]
        self.versions[commit.version] = self.federation.model.copy()
        self.ledger.append(dict(commit.record))
        self.committed = Committed.of(self.federation)

    def _ended(self, job: str, how: str) -> None:
        self.stayed.discard(job)
        assert job not in self.endings, f"{job} ended as {self.endings[job]}, and now as {how}"
        del self.jobs[job]
        self.endings[job] = how

    # Results

    @property
    def x(self) -> float:
        """The first parameter of the newest version."""
        return float(self.federation.model.parameters[0])

    @property
    def merged(self) -> list[dict[str, Any]]:
        """The ledger's merged updates, in order."""
        return [line for record in self.ledger if record["kind"] == "version" for line in record["merged"]]

    @property
    def rejections(self) -> list[str]:
        """The reasons of all rejections, in order."""
        return [record["reason"] for record in self.ledger if record["kind"] == "rejected"]


def start(*clients: str, model: Frame | None = None, evaluates: bool = False, **sections: Any) -> Run:
    """Start a run at version 0 with these clients alive; all parameters are 0 unless `model` is given."""
    run = Run(make_config(**sections), model or make_frame(), evaluates=evaluates)
    run.join(*clients)
    return run
