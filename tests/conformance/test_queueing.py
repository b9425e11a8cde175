"""fedqueue's use of RQ: jobs are visible to RQ's tools, no pickle is read, and a planted job runs no code."""

from __future__ import annotations

import builtins
import contextlib
import json
import os
import pickle
import signal
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import msgpack
import pytest
import redis
import rq.serializers
import rq.utils
import rq.webhook
import structlog
from redis.observability import recorder
from rq import Queue, SimpleWorker
from rq import Worker as RqWorker
from rq.exceptions import NoSuchJobError, StopRequested
from rq.job import Job

from fedqueue.errors import Fenced, JobClosed
from fedqueue.transport import rq_jobs
from fedqueue.transport.rq_jobs import TRAIN, Serializer, TrainingJob, client_queue
from fedqueue_worker.rq_worker import TrainingWorker
from tests.support.sample_run import SampleRun

QUEUE = "fedqueue:sample:c0"
_UNPICKLE = pickle.loads


class Recorder:
    """Stands in for a job runner: records the orders that it is asked to train."""

    told_to_stop = False

    def __init__(self, raises: Any = None) -> None:
        self.orders: list[Any] = []
        self._raises = raises

    def stop(self) -> None:
        self.told_to_stop = True

    def train(
        self, order: dict[str, Any], on_progress: Callable[..., Any], commands_for_post: Callable[..., Any]
    ) -> None:
        with contextlib.suppress(redis.RedisError):  # a job runner suppresses these errors too
            on_progress()
        self.orders.append(order["job"])
        if self._raises:
            raise self._raises


@pytest.fixture(autouse=True)
def _restore_signal_handlers() -> Iterator[None]:
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    yield
    for signum, handler in handlers.items():
        signal.signal(signum, handler)


@pytest.fixture(autouse=True)
def _nothing_is_unpickled(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("something was unpickled")

    monkeypatch.setattr(pickle, "loads", refuse)
    monkeypatch.setattr(pickle, "Unpickler", refuse)
    monkeypatch.setattr(rq.serializers.PickleSerializer, "loads", refuse)


@pytest.fixture(autouse=True, params=["short", "long"])
def duration(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run each test with short jobs and with long jobs, which RQ's tools show from their first progress."""
    monkeypatch.setattr("fedqueue_worker.rq_worker.SHOWN_SECONDS", 60.0 if request.param == "short" else 0.0)
    kind: str = request.param
    return kind


@pytest.fixture
def executed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Record the function calls that a planted job makes."""
    seen = []
    monkeypatch.setattr(os, "system", lambda *a: seen.append(("os.system", a)))
    monkeypatch.setattr(builtins, "eval", lambda *a, **k: seen.append(("eval", a)))
    monkeypatch.setattr(rq.webhook.Webhook, "send", lambda self, *a, **k: seen.append(("webhook", self.url)))
    yield seen
    assert EXPLODED == []


def test_pickle_bomb_runs_code_when_unpickled() -> None:
    _UNPICKLE(BOMB)
    assert EXPLODED.pop() == "boom"


EXPLODED: list[Any] = []


def detonate() -> None:
    EXPLODED.append("boom")


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return detonate, ()


BOMB = pickle.dumps(Bomb())  # pickled before the tests disable pickle


def make_worker(client: redis.Redis, recorder: Any, queues: tuple[Any, ...] = (QUEUE,)) -> TrainingWorker:
    return TrainingWorker(recorder, client, queues, "sample-worker")


def work(client: redis.Redis, recorder: Recorder | None = None, queues: tuple[Any, ...] = (QUEUE,)) -> list[Any]:
    """Run a worker until its queues are empty; return the jobs that the worker trained."""
    recorder = recorder or Recorder()
    with structlog.testing.capture_logs():
        make_worker(client, recorder, queues).work(burst=True, logging_level="CRITICAL")
    return recorder.orders


def plant(client: redis.Redis, job: str = "planted", **fields: Any) -> None:
    """Write an RQ job record by hand, as somebody with access to Redis could, at the front of the queue."""
    good = {"data": msgpack.packb([TRAIN, None, [], {"order": {"job": job}}]), "origin": QUEUE, "status": "queued"}
    record = {**good, "timeout": -1, "created_at": "2026-01-01T00:00:00.000000Z", **fields}
    client.hset(TrainingJob.key_for(job), mapping={k: v for k, v in record.items() if v is not None})
    client.lpush(client_queue(client, QUEUE).key, job)


def call(name: object, *args: str, instance: object = None, **kwargs: Any) -> bytes:
    packed: bytes = msgpack.packb([name, instance, list(args), kwargs])
    return packed


# As RQ's own tools see it


def test_enqueued_order_is_an_rq_job(redis_client: redis.Redis, run: SampleRun) -> None:
    run.dispatch(1)
    queue = Queue(QUEUE, connection=redis_client, serializer=Serializer)
    assert (len(queue), queue.job_ids) == (1, ["sample-00000001"])
    assert QUEUE in {q.name for q in Queue.all(connection=redis_client, serializer=Serializer)}
    job = Job.fetch("sample-00000001", connection=redis_client, serializer=Serializer)
    assert (job.func_name, job.origin, job.get_status()) == (TRAIN, QUEUE, "queued")
    assert job.kwargs["order"]["client"] == "c0"
    assert job.timeout == -1, "RQ never times a training out"
    assert job.description == "train c0 for sample"


def test_job_record_equals_the_one_that_rq_writes(redis_client: redis.Redis, run: SampleRun) -> None:
    run.dispatch(1)
    key = TrainingJob.key_for("sample-00000001")
    mine = redis_client.hgetall(key)
    rq_jobs.forget(redis_client, QUEUE, "sample-00000001")
    client_queue(redis_client, QUEUE).enqueue_call(
        TRAIN, kwargs={"order": run.order(1).model_dump()}, job_id="sample-00000001", timeout=-1, result_ttl=0,
        failure_ttl=rq_jobs.FAILED_SECONDS, description="train c0 for sample",
    )  # fmt: skip
    times = {b"created_at", b"enqueued_at"}
    theirs = {name: value for name, value in redis_client.hgetall(key).items() if value}
    assert mine.keys() == theirs.keys() >= times
    assert {n: v for n, v in mine.items() if n not in times} == {n: v for n, v in theirs.items() if n not in times}


def test_queue_is_listed_once(redis_client: redis.Redis, run: SampleRun) -> None:
    queues = rq_jobs.Queues(redis_client)
    for number in (1, 2):
        run.coordinator.enqueue(queues.record(QUEUE, run.order(number)))
        redis_client.delete("rq:queues")
    assert client_queue(redis_client, QUEUE).job_ids == ["sample-00000001", "sample-00000002"]
    assert not redis_client.exists("rq:queues")
    assert work(redis_client) == ["sample-00000001", "sample-00000002"]
    rq_jobs.Queues(redis_client).record(QUEUE, run.order(3))
    assert redis_client.smembers("rq:queues") == {b"rq:queue:" + QUEUE.encode()}


def test_job_lost_by_rq_can_be_enqueued_again(redis_client: redis.Redis, run: SampleRun) -> None:
    run.dispatch(1)
    rq_jobs.forget(redis_client, QUEUE, "sample-00000001")
    for _ in range(2):
        run.coordinator.enqueue(run.record(run.order(1)))
    assert work(redis_client) == ["sample-00000001"]


def test_scripts_are_reloaded_after_a_server_restart(redis_client: redis.Redis, run: SampleRun) -> None:
    redis_client.script_flush()
    run.dispatch(1)
    assert [job.job for job in run.coordinator.jobs()] == work(redis_client) == ["sample-00000001"]


def test_job_of_a_deposed_coordinator_never_starts(redis_client: redis.Redis, run: SampleRun) -> None:
    redis_client.hset(run.keys.leader, "token", "another one's")
    with pytest.raises(Fenced):
        run.dispatch(1)
    assert run.coordinator.jobs() == []
    with pytest.raises(JobClosed):
        run.worker().claim("sample-00000001", 60)


def test_enqueueing_an_order_twice_makes_one_job(redis_client: redis.Redis, run: SampleRun) -> None:
    run.dispatch(1)
    run.dispatch(1)
    assert client_queue(redis_client, QUEUE).job_ids == ["sample-00000001"]
    assert work(redis_client) == ["sample-00000001"]


def test_jobs_are_trained_once_in_queue_order(redis_client: redis.Redis, run: SampleRun) -> None:
    for number in (3, 1, 2):
        run.dispatch(number)
    assert work(redis_client) == ["sample-00000003", "sample-00000001", "sample-00000002"]
    assert work(redis_client) == []


def test_worker_with_several_queues_serves_them_all(redis_client: redis.Redis, run: SampleRun) -> None:
    run.dispatch(1)
    run.dispatch(2, "c1")
    assert set(work(redis_client, queues=(QUEUE, "fedqueue:sample:c1"))) == {"sample-00000001", "sample-00000002"}


def rq_names(client: redis.Redis) -> set[Any]:
    """Return RQ's remaining keys, except the worker's own record, which expires."""
    names = {key.decode() for key in client.scan_iter(match="rq:*")}
    assert all(client.ttl(name) > 0 for name in names if name.startswith("rq:worker:"))
    return {name for name in names if not name.startswith("rq:worker:")}


def test_trained_job_leaves_only_the_queue_name_in_rq(redis_client: redis.Redis, run: SampleRun) -> None:
    run.dispatch(1)
    work(redis_client)
    assert rq_names(redis_client) == {"rq:queues"}


def test_closed_job_leaves_nothing_in_rq(redis_client: redis.Redis, run: SampleRun) -> None:
    """The job is deleted from RQ during its training, and RQ's later bookkeeping must not recreate the job's keys."""

    class Closing(Recorder):
        def train(self, order: Any, *rq: Any) -> None:
            super().train(order, *rq)
            rq_jobs.forget(redis_client, QUEUE, order["job"])

    run.dispatch(1)
    run.dispatch(2)
    assert work(redis_client, Closing()) == ["sample-00000001", "sample-00000002"]
    assert rq_names(redis_client) == {"rq:queues"}


def test_long_job_is_shown_as_running(redis_client: redis.Redis, run: SampleRun, duration: str) -> None:
    class Looking(Recorder):
        def train(self, order: Any, *rq: Any) -> None:
            super().train(order, *rq)
            (worker,) = RqWorker.all(connection=redis_client)
            self.state = worker.get_state()
            self.running = client_queue(redis_client, QUEUE).started_job_registry.get_job_ids()
            self.job = Job.fetch(order["job"], connection=redis_client, serializer=Serializer)

    looking = Looking()
    run.dispatch(1)
    work(redis_client, looking)
    seen = looking.state, looking.running, looking.job.get_status(refresh=False)
    assert seen == (("busy", ["sample-00000001"], "started") if duration == "long" else ("idle", [], "queued"))
    assert redis_client.hget("rq:worker:sample-worker", "successful_job_count") == b"1"
    assert rq_names(redis_client) == {"rq:queues"}


def test_failed_job_is_only_in_the_failed_registry(redis_client: redis.Redis, run: SampleRun) -> None:
    run.dispatch(1)
    work(redis_client, Recorder(RuntimeError("boom")))
    queue = client_queue(redis_client, QUEUE)
    assert queue.failed_job_registry.get_job_ids() == ["sample-00000001"]
    assert queue.started_job_registry.get_job_ids() == redis_client.lrange(queue.intermediate_queue_key, 0, -1) == []
    assert redis_client.hget(TrainingJob.key_for("sample-00000001"), "worker_name") == b"sample-worker"


def test_job_closed_before_rq_shows_it_stays_closed(redis_client: redis.Redis, run: SampleRun) -> None:
    class Closed(Recorder):
        def train(self, order: Any, *rq: Any) -> None:
            rq_jobs.forget(redis_client, QUEUE, order["job"])
            super().train(order, *rq)
            self.left = {name for name in rq_names(redis_client) if order["job"] in name}

    closed = Closed()
    run.dispatch(1)
    work(redis_client, closed)
    assert closed.left == set()


# Deleting jobs


def test_forgotten_job_is_not_in_its_queue_and_has_no_record(redis_client: redis.Redis, run: SampleRun) -> None:
    run.dispatch(1)
    run.dispatch(2)
    rq_jobs.forget(redis_client, QUEUE, "sample-00000001")
    with pytest.raises(NoSuchJobError):
        Job.fetch("sample-00000001", connection=redis_client, serializer=Serializer)
    assert work(redis_client) == ["sample-00000002"]


def test_forgetting_an_unknown_job_removes_it_from_its_queue(redis_client: redis.Redis) -> None:
    queue = client_queue(redis_client, QUEUE)
    redis_client.rpush(queue.key, "sample-00000007", "sample-00000008")
    rq_jobs.forget(redis_client, QUEUE, "sample-00000007")
    assert queue.job_ids == ["sample-00000008"]


def test_forgotten_job_can_be_enqueued_again(redis_client: redis.Redis, run: SampleRun) -> None:
    run.dispatch(1)
    rq_jobs.forget(redis_client, QUEUE, "sample-00000001")
    run.dispatch(1)
    assert work(redis_client) == ["sample-00000001"]


def test_job_is_forgotten_if_its_worker_died_before_training(redis_client: redis.Redis, run: SampleRun) -> None:
    """With one queue RQ first moves a job to an intermediate list, where the job stays if the worker dies."""
    run.dispatch(1)
    queue = client_queue(redis_client, QUEUE)
    redis_client.lmove(queue.key, queue.intermediate_queue_key)
    rq_jobs.forget(redis_client, QUEUE, "sample-00000001")
    assert rq_names(redis_client) == {"rq:queues"}


def test_job_is_forgotten_if_its_worker_died_in_training(redis_client: redis.Redis, run: SampleRun) -> None:
    class Death(BaseException):
        pass

    run.dispatch(1)
    queue = client_queue(redis_client, QUEUE)
    cls = rq_jobs.job_class(lambda order: None)
    worker = SimpleWorker([queue], connection=redis_client, job_class=cls, serializer=Serializer)
    job = queue.fetch_job("sample-00000001")
    assert job is not None
    redis_client.lmove(queue.key, queue.intermediate_queue_key)
    worker.prepare_execution(job)
    worker.prepare_job_execution(job)
    assert len(queue.started_job_registry) == 1
    rq_jobs.forget(redis_client, QUEUE, "sample-00000001")
    assert len(queue.started_job_registry) == 0
    assert not redis_client.exists(TrainingJob.key_for("sample-00000001"))


def test_forgetting_deletes_a_record_that_rq_cannot_read(redis_client: redis.Redis) -> None:
    plant(redis_client, status="no such status")
    rq_jobs.forget(redis_client, QUEUE, "planted")
    assert rq_names(redis_client) == set()


def test_deleting_a_queue_leaves_no_keys(redis_client: redis.Redis, run: SampleRun) -> None:
    for number in (1, 2, 3):
        run.dispatch(number)
    plant(redis_client, data=call("os.system", "true"))
    run.dispatch(4, "c1")
    work(redis_client, Recorder(RuntimeError("planted and failed")))
    run.dispatch(5)
    rq_jobs.delete_queue(redis_client, QUEUE)
    left = rq_names(redis_client)
    assert not [name for name in left if QUEUE in name]
    assert redis_client.smembers("rq:queues") == {b"rq:queue:fedqueue:sample:c1"}
    assert left == {"rq:queues", "rq:queue:fedqueue:sample:c1", "rq:job:sample-00000004"}


# Planted jobs

PLANTED = {
    "a pickle in data": {"data": pickle.dumps(("os.system", None, ("true",), {}))},
    "a compressed pickle in data": {"data": zlib.compress(BOMB)},
    "a pickle bomb in data": {"data": BOMB},
    "a pickle bomb in meta": {"meta": BOMB},
    "a pickle bomb as result": {"result": BOMB},
    "os.system": {"data": call("os.system", "true")},
    "eval": {"data": call("builtins.eval", "1")},
    "a method of an instance": {"data": call("system", "true", instance="os")},
    "train as a method": {"data": call(TRAIN, instance={"a": 1})},
    "a function that is no name": {"data": call(["os.system"], "true")},
    "no function": {"data": call(None)},
    "an extension type": {"data": msgpack.packb([msgpack.ExtType(1, b"x"), None, [], {}])},
    "too few parts": {"data": msgpack.packb(["os.system"])},
    "no data": {"data": b""},
    "a compression bomb in data": {"data": zlib.compress(bytes(2**26))},
    "a compression bomb as traceback": {"exc_info": zlib.compress(bytes(2**26))},
    "a huge message": {"data": msgpack.packb(["x" * 100_000, None, [], {}])},
    "other arguments": {"data": call(TRAIN, "surplus", order={"job": "x"})},
    "arguments that are none": {"data": msgpack.packb([TRAIN, None, 5, 7])},
    "a garbage date": {"created_at": "yesterday"},
    "an unknown status": {"status": "no such status"},
    "a garbage timeout": {"timeout": "soon"},
    "an endless timeout": {"timeout": 2**63, "data": call("os.system")},
    "a garbage origin": {"origin": b"\xff\xfe"},
    "garbage dependencies": {"dependency_ids": "{"},
    "a group that is not there": {"group_id": "nobody", "data": call("os.system")},
    "no retention": {"failure_ttl": "-9" * 30, "data": call("os.system")},
    "endless retries": {"retries_left": 3, "data": call("os.system")},
}


@pytest.mark.parametrize("what", PLANTED)
def test_planted_job_executes_nothing_and_is_skipped(
    redis_client: redis.Redis, run: SampleRun, executed: list[Any], what: str
) -> None:
    plant(redis_client, **PLANTED[what])
    run.dispatch(1)
    trained = work(redis_client)
    assert trained[-1] == "sample-00000001"
    assert set(trained) <= {"planted", "sample-00000001"}
    assert executed == []
    assert len(client_queue(redis_client, QUEUE)) == 0
    assert len(client_queue(redis_client, QUEUE).started_job_registry) == 0


def test_worker_reads_only_the_call_in_a_job_record(redis_client: redis.Redis) -> None:
    plant(
        redis_client, created_at="yesterday", timeout="soon", status="none", dependency_ids="{", failure_ttl="-9" * 30
    )
    assert work(redis_client) == ["planted"]


@pytest.mark.parametrize(
    "name", ["os.system", "builtins.eval", "fedqueue_worker.job_runner.Round.train", TRAIN + "x", ""]
)
def test_foreign_function_is_refused_by_name(redis_client: redis.Redis, name: str) -> None:
    plant(redis_client, data=call(name))
    job = rq_jobs.job_class(print).fetch("planted", connection=redis_client, serializer=Serializer)
    with pytest.raises(Exception, match=r"allowed: fedqueue_worker\.job_runner\.train"):
        _ = job.func
    bare = TrainingJob.fetch("planted", connection=redis_client, serializer=Serializer)
    with pytest.raises(Exception, match="allowed: nothing"):
        _ = bare.func


def test_order_for_a_method_of_an_instance_is_not_trained(redis_client: redis.Redis, run: SampleRun) -> None:
    plant(redis_client, data=call(TRAIN, instance="os", order={"job": "planted"}))
    run.dispatch(1)
    assert work(redis_client) == ["sample-00000001"]


def test_refused_job_is_shown_as_failed_until_it_expires(redis_client: redis.Redis, executed: list[Any]) -> None:
    plant(redis_client, data=call("os.system", "true"), failure_ttl=rq_jobs.FAILED_SECONDS)
    work(redis_client)
    assert client_queue(redis_client, QUEUE).failed_job_registry.get_job_ids() == ["planted"]
    assert 0 < redis_client.ttl(TrainingJob.key_for("planted")) <= rq_jobs.FAILED_SECONDS


@pytest.mark.parametrize("outcome", [None, RuntimeError("boom")], ids=["success", "failure"])
def test_planted_callbacks_and_webhooks_do_not_run(
    redis_client: redis.Redis, executed: list[Any], outcome: Any
) -> None:
    hooks = [
        {"url": "http://localhost:1/", "status": status, "job_status": status} for status in ("finished", "failed")
    ]
    plant(
        redis_client,
        success_callback_name="os.system",
        failure_callback_name="os.system",
        stopped_callback_name="builtins.eval",
        webhooks=json.dumps(hooks),
    )
    assert work(redis_client, Recorder(outcome)) == ["planted"]
    assert executed == []


def test_planted_non_text_name_is_skipped(redis_client: redis.Redis, run: SampleRun) -> None:
    run.dispatch(1)
    redis_client.lpush(client_queue(redis_client, QUEUE).key, b"\xff\xfe")
    redis_client.lpush(client_queue(redis_client, QUEUE).key, b"not/a/job id")
    assert work(redis_client) == ["sample-00000001"]


def test_planted_record_of_another_type_is_skipped(redis_client: redis.Redis, run: SampleRun) -> None:
    run.dispatch(1)
    redis_client.set(TrainingJob.key_for("planted"), BOMB)
    redis_client.lpush(client_queue(redis_client, QUEUE).key, "planted")
    assert work(redis_client) == ["sample-00000001"]


def test_planted_keys_do_not_stop_the_worker(redis_client: redis.Redis, run: SampleRun) -> None:
    plant(redis_client)
    redis_client.set("rq:executions:planted", "where RQ expects a sorted set")
    run.dispatch(1)
    assert work(redis_client) == ["planted", "sample-00000001"]
    assert not redis_client.exists(TrainingJob.key_for("planted"))


def test_record_timeout_does_not_limit_how_long_rq_shows_a_job(redis_client: redis.Redis) -> None:
    plant(redis_client, timeout=10**12)
    job = TrainingJob.fetch("planted", connection=redis_client, serializer=Serializer)
    assert make_worker(redis_client, Recorder()).get_heartbeat_ttl(job) < 3600


def test_remote_rq_commands_are_ignored(redis_client: redis.Redis, run: SampleRun) -> None:
    seen = []

    class Listening(Recorder):
        def train(self, order: Any, *rq: Any) -> None:
            super().train(order, *rq)
            seen.append(redis_client.pubsub_numsub("rq:pubsub:sample-worker"))

    run.dispatch(1)
    work(redis_client, Listening())
    assert [count for [(_, count)] in seen] == [0]


# Stopping


def test_stop_between_jobs_prevents_the_next_job(redis_client: redis.Redis, run: SampleRun) -> None:
    class Stopping(Recorder):
        def train(self, order: Any, *rq: Any) -> None:
            super().train(order, *rq)
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)  # a second SIGTERM changes nothing

    run.dispatch(1)
    run.dispatch(2)
    assert work(redis_client, Stopping()) == ["sample-00000001"]
    assert client_queue(redis_client, QUEUE).job_ids == ["sample-00000002"]


def test_idle_worker_stops_at_once_on_a_stop_request(redis_client: redis.Redis) -> None:
    worker = make_worker(redis_client, Recorder())
    with pytest.raises(StopRequested):
        worker.request_stop(signal.SIGTERM, None)
    worker.request_stop(signal.SIGTERM, None)


@pytest.mark.timeout(30)
def test_stop_swallowed_by_redis_py_still_ends_the_wait(
    redis_client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """redis-py's telemetry hooks around each command discard an exception raised by a signal handler."""
    asked, signals = vars(recorder)["get_observability_instance"], [signal.SIGTERM]

    def interrupted() -> Any:
        while signals:
            os.kill(os.getpid(), signals.pop())
        return asked()

    worker = make_worker(redis_client, Recorder())
    worker._install_signal_handlers()
    monkeypatch.setattr(recorder, "get_observability_instance", interrupted)
    with pytest.raises(StopRequested):
        worker.dequeue_job_and_maintain_ttl(1)
    assert not signals
    assert worker.last_heartbeat is None, "the stop did not end the wait itself"


# The serializer


def test_serializer_accepts_plain_values_only() -> None:
    assert Serializer.loads(Serializer.dumps({"a": [1, "b", None, 2.5]})) == {"a": [1, "b", None, 2.5]}
    with pytest.raises(Exception, match="cannot be sent"):
        Serializer.dumps(object())
    with pytest.raises(Exception, match="not msgpack"):
        Serializer.loads(pickle.dumps(("os.system", None, ("true",), {})))
