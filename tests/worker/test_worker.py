"""A worker process, from joining a run to leaving it."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import signal
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import redis
import rq.suspension
import torch
from torch.utils.data import TensorDataset

from fedqueue import Task
from fedqueue.config.schema import Config
from fedqueue.errors import ClientTaken, ConfigurationError, LoadFailed, ManifestMismatch, ServerUnavailable
from fedqueue.protocol.messages import Ending, Unavailable, read
from fedqueue.transport.retry import RedisRetry
from fedqueue.transport.worker_store import WorkerStore
from fedqueue_worker.policy import Policy
from fedqueue_worker.process import Worker, new_token
from fedqueue_worker.rq_worker import TrainingWorker
from tests.support.redis_commands import stored_field
from tests.support.sample_run import SampleRun

pytestmark = pytest.mark.usefixtures("logs", "process_restored")


class Noise(Task):
    def __init__(self) -> None:
        self.loaded: list[Any] = []
        self.while_loading: Callable[[], object] = lambda: None
        self.while_training: Callable[[], object] = lambda: None

    def model(self) -> Any:
        return torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))

    def train_data(self, client: Any) -> TensorDataset:
        self.loaded.append(client)
        self.while_loading()
        return TensorDataset(torch.randn(10, 3), torch.randint(0, 2, (10,)))

    def loss(self, model: Any, batch: Any) -> Any:
        self.while_training()
        return super().loss(model, batch)


@pytest.fixture
def task() -> Noise:
    return Noise()


def start(
    run: SampleRun,
    task: Any,
    candidates: Any = (("client-0",),),
    max_jobs: Any = None,
    burst: bool = False,
    config: Config | None = None,
) -> Any:
    return Worker(config or run.config, task, run.worker(new_token())).run(candidates, max_jobs, burst)


def enqueue(run: SampleRun, number: int = 1, client: str = "client-0") -> None:
    run.dispatch(number, client)


def kinds(run: SampleRun) -> Any:
    return [entry.kind for entry in run.coordinator.unacknowledged()]


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


# Normal operation


def test_worker_joins_registers_trains_and_leaves(fake_run: SampleRun, task: Noise) -> None:
    enqueue(fake_run)
    assert start(fake_run, task, max_jobs=1) == "max_jobs reached: 1"
    entries = fake_run.coordinator.unacknowledged()
    assert [(e.kind, e.client) for e in entries] == [
        ("joined", "client-0"), ("update", "client-0"), ("left", "client-0"),
    ]  # fmt: skip
    assert fake_run.coordinator.registrations()["client-0"]["examples"] == 10
    assert fake_run.coordinator.alive_clients() == []
    assert [(c.id, c.partition, c.partitions) for c in task.loaded] == [("client-0", 0, 8)]


def hidden_run(client: redis.Redis, task: Noise) -> SampleRun:
    """A run in which numbers of examples are hidden; the task gets its model."""
    run = SampleRun(client, batch_norm=False, secure={"keepers": ["north", "south"], "examples": "hidden"})
    task.model = lambda: run.module  # type: ignore[method-assign]
    return run


def test_registration_tells_no_hidden_number_of_examples(fake_client: redis.Redis, task: Noise) -> None:
    run = hidden_run(fake_client, task)
    assert start(run, task, burst=True)
    assert run.coordinator.registrations() == {"client-0": {"client": "client-0", "examples": 0}}


def test_failed_load_tells_no_hidden_number_of_examples(fake_client: redis.Redis, task: Noise) -> None:
    run = hidden_run(fake_client, task)

    def fail() -> None:
        raise ValueError("1234 rows are too many")

    task.while_loading = fail
    with pytest.raises(LoadFailed, match="1234 rows"):  # at the site
        start(run, task, burst=True)
    assert "1234" not in repr(run.contents())
    assert "ValueError: its text stays at the site, whose number of examples is hidden" in repr(run.contents())


def test_post_deletes_the_record_of_a_job_and_counts_it(
    fake_run: SampleRun, task: Noise, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The post deletes the record, so RQ's later bookkeeping has nothing to delete."""
    left: list[Any] = []
    counted: list[Any] = []
    original = TrainingWorker.handle_job_success

    def after_the_post(worker: Any, job: Any, **others: Any) -> None:
        left.extend(name for name in fake_run.contents() if job.id in name and name.startswith("rq:"))
        left.extend(fake_run.client.lrange(f"rq:queue:{job.origin}:intermediate", 0, -1))
        original(worker, job=job, **others)
        counted.append(int(stored_field(fake_run.client, worker.key, "successful_job_count")))

    monkeypatch.setattr(TrainingWorker, "handle_job_success", after_the_post)
    enqueue(fake_run)
    start(fake_run, task, max_jobs=1)
    assert (left, counted) == ([], [1])


def test_worker_of_several_clients_trains_for_all(fake_run: SampleRun, task: Noise) -> None:
    for number, client in ((1, "client-0"), (2, "client-3"), (3, "client-0")):
        enqueue(fake_run, number, client)
    task.while_training = lambda: terminate() if fake_run.updates()[2:] else None
    enqueue(fake_run, 4, "client-3")
    assert start(fake_run, task, [["client-0"], ["client-3"]]) == "stopped"
    assert [c.id for c in task.loaded] == ["client-0", "client-3"]
    entries = fake_run.coordinator.unacknowledged()
    assert {e.job: e.client for e in entries if e.kind == "update"} == {
        "sample-00000001": "client-0", "sample-00000002": "client-3", "sample-00000003": "client-0",
    }  # fmt: skip
    assert [e.client for e in entries if e.kind == "left"] == ["client-0", "client-3"]


def test_max_jobs_ends_the_worker_after_that_many_jobs(fake_run: SampleRun, task: Noise) -> None:
    for number in (1, 2, 3):
        enqueue(fake_run, number)
    assert start(fake_run, task, max_jobs=2) == "max_jobs reached: 2"
    assert kinds(fake_run) == ["joined", "update", "update", "left"]
    assert fake_run.client.llen(f"rq:queue:{fake_run.keys.queue('client-0')}") == 1


@pytest.mark.timeout(30)
def test_max_jobs_counts_across_restarts_of_rqs_loop(
    fake_run: SampleRun, task: Noise, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RQ's loop ends after the first job, and the next loop must take one more job, not two."""
    original = TrainingWorker.perform_job
    broken: list[Any] = []

    def once_broken(*args: Any) -> None:
        original(*args)
        if not broken:
            broken.append(1)
            raise redis.ConnectionError("gone")

    monkeypatch.setattr(TrainingWorker, "perform_job", once_broken)
    for number in (1, 2, 3):
        enqueue(fake_run, number)
    start(fake_run, task, max_jobs=2)
    assert broken
    assert kinds(fake_run).count("update") == 2


@pytest.mark.timeout(30)
def test_burst_ends_the_worker_if_no_job_is_waiting(fake_run: SampleRun, task: Noise) -> None:
    assert start(fake_run, task, burst=True) == "no job is waiting (burst)"
    assert kinds(fake_run) == ["joined", "left"]


@pytest.mark.timeout(30)
def test_burst_trains_waiting_jobs_first(fake_run: SampleRun, task: Noise) -> None:
    enqueue(fake_run, 1)
    enqueue(fake_run, 2)
    assert start(fake_run, task, burst=True) == "no job is waiting (burst)"
    assert kinds(fake_run) == ["joined", "update", "update", "left"]


@pytest.mark.timeout(30)
def test_burst_ends_a_worker_that_rq_has_suspended(fake_run: SampleRun, task: Noise) -> None:
    enqueue(fake_run)
    rq.suspension.suspend(fake_run.client)
    assert start(fake_run, task, burst=True) == "no job is waiting (burst)"
    assert kinds(fake_run) == ["joined", "left"]


def test_worker_uses_the_threads_of_its_own_configuration(fake_run: SampleRun, task: Noise) -> None:
    enqueue(fake_run)
    config = fake_run.config.model_copy(update={"training": fake_run.config.training.model_copy(update={"threads": 2})})
    start(fake_run, task, max_jobs=1, config=config)
    assert torch.get_num_threads() == 2


def test_worker_stops_when_the_run_ends(fake_run: SampleRun, task: Noise) -> None:
    run = SampleRun(fake_run.client, "short", dispatch={"lease_seconds": 0.03})
    task.while_training = lambda: run.coordinator.end("target reached", 60, 1)
    enqueue(run)
    assert start(run, task) == "the run has ended"


# Joining


def test_worker_claims_a_free_partition(fake_run: SampleRun, task: Noise) -> None:
    fake_run.join("client-0", "another")
    enqueue(fake_run, 1, "client-1")
    start(fake_run, task, [fake_run.config.clients.ids], max_jobs=1)
    assert [c.id for c in task.loaded] == ["client-1"]


def test_worker_of_two_partitions_claims_two_different_ones(fake_run: SampleRun, task: Noise) -> None:
    enqueue(fake_run, 1, "client-1")
    start(fake_run, task, [fake_run.config.clients.ids] * 2, max_jobs=1)
    assert [c.id for c in task.loaded] == ["client-0", "client-1"]


def test_taken_client_is_an_error_and_frees_the_others(fake_run: SampleRun, task: Noise) -> None:
    fake_run.join("client-1", "another")
    with pytest.raises(ClientTaken, match="client client-1 is served by another worker"):
        start(fake_run, task, [["client-0"], ["client-1"]])
    assert fake_run.coordinator.alive_clients() == ["client-1"]
    assert task.loaded == []


def test_no_free_partition_is_an_error_with_the_count(fake_run: SampleRun, task: Noise) -> None:
    for i in range(8):
        fake_run.join(f"client-{i}", "another")
    with pytest.raises(ClientTaken, match="all 8 partitions are served by other workers"):
        start(fake_run, task, [fake_run.config.clients.ids])


def test_task_with_another_model_is_an_error_before_loading(
    fake_run: SampleRun, task: Noise, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(task, "model", lambda: torch.nn.Linear(3, 3))
    with pytest.raises(ManifestMismatch, match="this worker's task does not fit run 'sample': model: "):
        start(fake_run, task)
    assert (kinds(fake_run), task.loaded) == ([], [])


def test_worker_of_an_ended_run_returns_at_once(fake_run: SampleRun, task: Noise) -> None:
    fake_run.coordinator.end("target reached", 60, 1)
    assert start(fake_run, task) == "the run has ended: target reached"
    assert task.loaded == []


def test_worker_waits_for_its_coordinator_and_logs_it_once(
    fake_run: SampleRun, task: Noise, monkeypatch: pytest.MonkeyPatch, logs: Any
) -> None:
    late: list[SampleRun] = []
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        if len(slept) == 2:
            late.append(SampleRun(fake_run.client, "late"))
            enqueue(late[0])
        slept.append(seconds)

    monkeypatch.setattr("time.sleep", sleep)
    worker = Worker(fake_run.config, task, worker_store(fake_run.client, "late"))
    assert worker.run([["client-0"]], max_jobs=1) == "max_jobs reached: 1"
    assert kinds(late[0]) == ["joined", "update", "left"]
    assert [entry["event"] for entry in logs].count("waiting for a coordinator to start the run") == 1


def worker_store(client: redis.Redis, run: str) -> WorkerStore:
    return WorkerStore(client, run, new_token())


# Stop requests


def test_stop_during_training_hands_the_job_back(fake_run: SampleRun, task: Noise) -> None:
    task.while_training = terminate
    enqueue(fake_run)
    assert start(fake_run, task) == "stopped"
    joined, ended, left = fake_run.coordinator.unacknowledged()
    assert (joined.kind, ended.kind, left.kind) == ("joined", "ended", "left")
    assert read(Ending, ended.body).reason == "returned"
    assert fake_run.coordinator.open_jobs() == 0


@pytest.mark.timeout(30)
def test_stop_during_an_outage_ends_the_worker_in_one_line(
    fake_run: SampleRun, task: Noise, logs: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def outage() -> None:
        fake_run.client.connection_pool.connection_kwargs["server"].connected = False
        terminate()

    task.while_training = outage
    enqueue(fake_run)
    with caplog.at_level(logging.WARNING, "rq"):
        assert start(fake_run, task) == "stopped"
    warnings = [entry["event"] for entry in logs if entry["log_level"] != "info"]
    assert warnings == ["job not handed back: its lease has to expire"]
    assert caplog.records == [], "RQ logged a traceback"


@pytest.mark.timeout(30)
def test_stop_while_an_outage_holds_back_a_failure_is_one_line(
    fake_run: SampleRun, task: Noise, logs: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        fake_run.client.connection_pool.connection_kwargs["server"].connected = False
        raise OSError("no such row")

    monkeypatch.setattr("fedqueue.transport.retry.LONGEST_SECONDS", 0.0)
    waits = itertools.count()
    wait = RedisRetry.wait

    def stop_at_the_second(retry: RedisRetry, error: redis.RedisError) -> None:
        if next(waits) == 1:
            terminate()
        wait(retry, error)

    monkeypatch.setattr(RedisRetry, "wait", stop_at_the_second)
    task.while_training = fail
    enqueue(fake_run)
    with caplog.at_level(logging.WARNING, "rq"):
        assert start(fake_run, task) == "stopped"
    assert [entry["event"] for entry in logs if entry["log_level"] != "info"] == [
        "training failed",
        "waiting for Redis",
        "end of the job not reported: its lease has to expire",
    ]
    assert caplog.records == [], "RQ logged a traceback"


def test_stop_during_loading_releases_the_client_and_exits_0(fake_run: SampleRun, task: Noise) -> None:
    task.while_loading = terminate
    with pytest.raises(SystemExit) as ended:
        start(fake_run, task)
    assert not ended.value.code
    assert kinds(fake_run) == ["left"]
    assert fake_run.coordinator.alive_clients() == []


def test_stop_while_waiting_for_the_run_exits_0(
    fake_client: redis.Redis, fake_run: SampleRun, task: Noise, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: terminate())
    with pytest.raises(SystemExit) as ended:
        Worker(fake_run.config, task, worker_store(fake_client, "not-yet")).run([["client-0"]])
    assert not ended.value.code


def lost_signal(*args: Any) -> None:
    """Simulate SIGTERM inside a finalizer, where Python drops the exception that the handler raises."""
    with contextlib.suppress(BaseException):
        terminate()


@pytest.mark.timeout(30)
def test_lost_stop_during_loading_ends_before_the_first_job(fake_run: SampleRun, task: Noise) -> None:
    task.while_loading = lost_signal
    enqueue(fake_run)
    assert start(fake_run, task) == "stopped"
    assert kinds(fake_run) == ["joined", "left"]
    assert fake_run.coordinator.open_jobs() == 1


@pytest.mark.timeout(30)
def test_lost_stop_while_waiting_ends_at_the_next_poll(
    fake_client: redis.Redis, fake_run: SampleRun, task: Noise, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lost_signal)
    with pytest.raises(SystemExit) as ended:
        Worker(fake_run.config, task, worker_store(fake_client, "not-yet")).run([["client-0"]])
    assert not ended.value.code


@pytest.mark.timeout(30)
def test_stop_between_two_rq_loops_starts_no_further_loop(
    fake_run: SampleRun, task: Noise, monkeypatch: pytest.MonkeyPatch, logs: Any
) -> None:
    """The first loop ends in the middle of a job, so RQ's worker is still in the state busy."""
    monkeypatch.setattr(TrainingWorker, "perform_job", broken_off)
    monkeypatch.setattr(RedisRetry, "wait", lost_signal)
    enqueue(fake_run)
    assert start(fake_run, task) == "stopped"
    assert [entry["event"] for entry in logs].count("RQ's loop was interrupted: restarting it") == 1


def broken_off(*args: Any) -> None:
    raise redis.ConnectionError("gone")


# A server that refuses a command or is away


class Queues:
    """Stands for RQ's queues: its first reads raise `errors`, the next ones find no job."""

    def __init__(self, *errors: Any) -> None:
        self.errors = list(errors)

    def dequeue_any(self, *args: Any, **kwargs: Any) -> None:
        if self.errors:
            raise self.errors.pop(0)


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    ("refusal", "says"),
    [
        (redis.ResponseError("unknown command 'BLMOVE', with args beginning with: 'rq:queue:x'"), "no command BLMOVE"),
        (redis.exceptions.NoPermissionError("this user has no permissions to run 'blmove'"), "run `fedqueue acl`"),
    ],
)
def test_refused_command_ends_the_worker_in_one_line(
    fake_run: SampleRun,
    task: Noise,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    refusal: Any,
    says: str,
) -> None:
    monkeypatch.setattr("fedqueue_worker.rq_worker.queue_class", lambda queues: Queues(refusal, refusal))
    with caplog.at_level(logging.WARNING, "rq"), pytest.raises(ServerUnavailable, match=says):
        start(fake_run, task, burst=True)
    assert caplog.records == [], "RQ logged a traceback"
    assert kinds(fake_run) == ["joined", "left"]


@pytest.mark.timeout(30)
def test_outage_in_rqs_loop_is_named_without_a_traceback(
    fake_run: SampleRun, task: Noise, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, logs: Any
) -> None:
    replica = redis.exceptions.ReadOnlyError("You can't write against a read only replica.")
    first = Queues(replica, replica)
    monkeypatch.setattr("fedqueue_worker.rq_worker.queue_class", lambda queues: first)
    monkeypatch.setattr(RedisRetry, "wait", lambda retry, error: None)
    assert start(fake_run, task, burst=True) == "no job is waiting (burst)"
    assert caplog.records == [], "RQ logged a traceback"
    assert [entry["because"] for entry in logs if "interrupted" in entry["event"]] == [
        "it is a read-only replica: waiting for a new primary"
    ]


def test_policy_that_requires_keepers_leaves_the_client_out(fake_run: SampleRun, task: Noise) -> None:
    worker = Worker(fake_run.config, task, fake_run.worker(new_token()), Policy(min_keepers=1))
    with pytest.raises(LoadFailed, match="client-0: this site's policy: min_keepers: the run has no keepers"):
        worker.run([["client-0"]])
    [entry] = [entry for entry in fake_run.coordinator.unacknowledged() if entry.kind == "unavailable"]
    assert read(Unavailable, entry.body).error.startswith("this site's policy: min_keepers: ")
    assert task.loaded == []


def test_error_during_loading_releases_the_client(fake_run: SampleRun, task: Noise) -> None:
    def broken() -> None:
        raise FileNotFoundError("no rows here")

    task.while_loading = broken
    with pytest.raises(LoadFailed, match="client-0: FileNotFoundError: no rows here; in broken"):
        start(fake_run, task)
    assert kinds(fake_run) == ["unavailable"]
    assert not fake_run.coordinator.alive_clients()


def test_num_examples_may_be_a_numpy_integer(fake_run: SampleRun, task: Noise, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task, "num_examples", lambda data: np.int64(len(data)))
    enqueue(fake_run)
    start(fake_run, task, max_jobs=1)
    assert fake_run.coordinator.registrations()["client-0"]["examples"] == 10


def test_client_that_the_run_does_not_know_is_refused(fake_run: SampleRun, task: Noise) -> None:
    with pytest.raises(ConfigurationError, match=r"did you mean 'client-0'.*--new-client"):
        start(fake_run, task, [["client_0"]])
    assert kinds(fake_run) == []


def test_new_client_is_accepted_when_asked_for(fake_run: SampleRun, task: Noise) -> None:
    worker = Worker(fake_run.config, task, fake_run.worker(new_token()))
    worker.run([["north"]], burst=True, new_clients=True)
    assert kinds(fake_run) == ["joined", "left"]
