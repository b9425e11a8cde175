"""RQ without pickle: a msgpack serializer, a job class that runs allow-listed functions only, one queue per client.

fedqueue's lease owns the life of a job. RQ carries it to the worker and shows it to RQ's tools; it never times it
out, never retries it, and keeps no result.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import redis
from rq import Queue
from rq.exceptions import InvalidJobOperation, NoSuchJobError
from rq.job import Job, JobStatus
from rq.timeouts import BaseDeathPenalty
from rq.utils import as_text, now

from fedqueue.errors import WireError
from fedqueue.protocol.messages import MAX_MESSAGE, Order, pack, unpack

TRAIN = "fedqueue_worker.job_runner.train"
"""The name of the one function that a job may call; it is looked up in the worker's allow-list, never imported."""

FAILED_SECONDS = 3600  # a job that RQ itself calls failed (foreign, malformed) stays visible so long


class Serializer:
    """RQ's serializer: msgpack, plain values, bounded."""

    @staticmethod
    def dumps(obj: Any) -> bytes:
        return pack(obj)

    @staticmethod
    def loads(data: bytes) -> Any:
        return unpack(data)


class NoTimeout(BaseDeathPenalty):
    """Honest long training is not bounded; the lease and its progress say when a job is over."""

    def setup_death_penalty(self) -> None:
        """No alarm."""

    def cancel_death_penalty(self) -> None:
        """Nothing to cancel."""


class TrainingJob(Job):
    """A job of which nothing is imported: its function comes from `allowed`, its callbacks do not run."""

    allowed: Mapping[str, Callable[..., Any]] = {}

    @property
    def func(self) -> Callable[..., Any]:
        name = self.func_name or ""
        if self.instance is not None or name not in self.allowed:
            raise WireError(f"job {self.id} asks for {name!r}; allowed: {', '.join(self.allowed) or 'nothing'}")
        return self.allowed[name]

    @property
    def success_callback(self) -> None:
        return None

    @property
    def failure_callback(self) -> None:
        return None

    @property
    def stopped_callback(self) -> None:
        return None

    def restore(self, raw_data: Mapping[bytes, bytes]) -> Any:
        """As RQ's, which inflates what it finds; raises WireError for what would become larger than a message."""
        for field in (b"data", b"exc_info"):
            self._inflated(field.decode(), raw_data.get(field, b""))
        return super().restore(raw_data)

    def _inflated(self, field: str, data: bytes) -> bytes:
        try:
            inflated = zlib.decompressobj().decompress(data, MAX_MESSAGE + 1)
        except zlib.error:  # not compressed: RQ takes it as it is
            return data
        if len(inflated) > MAX_MESSAGE:
            raise WireError(f"job {self.id}: {field} inflates to more than {MAX_MESSAGE} bytes")
        return inflated

    def send_webhooks(self, *args: Any, **kwargs: Any) -> None:
        """A job cannot make a worker call an address."""


class TakenJob(TrainingJob):
    """A job as its worker reads it: whose queue it came from, and what is to be called. Nothing else in it counts."""

    def refresh(self) -> None:
        """Raises NoSuchJobError where there is no record, or one without a call."""
        record = cast(dict[bytes, bytes], self.connection.hgetall(self.key))
        if b"data" not in record:
            raise NoSuchJobError(f"no such job: {self.id}")
        self.origin, self.data = as_text(record.get(b"origin", b"")), self._inflated("data", record[b"data"])
        self.failure_ttl = FAILED_SECONDS


def job_class(train: Callable[..., Any]) -> type[TakenJob]:
    """The job class of one worker: `TRAIN` calls `train`, any other name is refused."""
    return type("TakenJob", (TakenJob,), {"allowed": {TRAIN: train}})


def client_queue(client: redis.Redis, name: str, cls: type[Job] = TrainingJob) -> Queue:
    return Queue(name, connection=client, serializer=Serializer, job_class=cls, death_penalty_class=NoTimeout)


@dataclass(frozen=True)
class RqJobRecord:
    """RQ's record of a job that waits in its queue: under which keys, and its fields, names and values in turns."""

    job: str
    key: str
    queue: str
    fields: list[Any]


def queue_class(queues: Iterable[Queue]) -> type[Queue]:
    """RQ's queues, of a worker that serves these: RQ makes one anew for each job that is taken."""
    served = {queue.key: queue for queue in queues}

    class Served(Queue):
        @classmethod
        def from_queue_key(cls, queue_key: str, *args: Any, **kwargs: Any) -> Queue:
            return served[queue_key]

    return Served


class Queues:
    """The clients' queues, as their coordinator fills them."""

    def __init__(self, client: redis.Redis) -> None:
        self._client = client
        self._listed: set[str] = set()
        self._job = TrainingJob.create(
            TRAIN,
            timeout=-1,
            result_ttl=0,
            failure_ttl=FAILED_SECONDS,
            status=JobStatus.QUEUED,
            serializer=Serializer,
            connection=client,
        )  # each one in its turn: making one takes as long as all the rest

    def record(self, queue: str, order: Order, envelope: bytes | None = None) -> RqJobRecord:
        """What RQ would write to enqueue the order, or its seal; a queue is listed at its first one."""
        job = self._job
        job.id, job.origin, job.description = order.job, queue, f"train {order.client} for {order.run}"
        job.kwargs = {"order": order.model_dump() if envelope is None else envelope}
        job.created_at = job.enqueued_at = now()
        fields = [item for name, value in job.to_dict().items() if value != "" for item in (name, value)]
        key = f"{Queue.redis_queue_namespace_prefix}{queue}"
        if queue not in self._listed:  # once is enough, RQ says it for each job
            self._client.sadd(Queue.redis_queues_keys, key)
            self._listed.add(queue)
        return RqJobRecord(job.id, job.key, key, fields)


def forget(client: redis.Redis, queue: str, job: str) -> None:
    """Take a job out of RQ wherever it is: queue, registries, executions."""
    place = client_queue(client, queue)
    try:
        TrainingJob.fetch(job, connection=client, serializer=Serializer).delete()
    except (NoSuchJobError, InvalidJobOperation):  # its worker has just finished with it
        pass
    except (redis.ConnectionError, redis.TimeoutError):
        raise
    except Exception:  # what lies there is no record of RQ's
        client.delete(TrainingJob.key_for(job))
    for key in (place.key, place.intermediate_queue_key):
        client.lrem(key, 0, job)


def delete_queue(client: redis.Redis, name: str) -> None:
    """Delete a client's queue with every job in it and in its registries."""
    queue = client_queue(client, name)
    registries = (queue.started_job_registry, queue.failed_job_registry, queue.finished_job_registry)
    jobs = {job for registry in registries for job in registry.get_job_ids(cleanup=False)}
    for job in jobs:
        forget(client, name, job)
    queue.delete(delete_jobs=True)
    client.delete(queue.intermediate_queue_key, *(r.key for r in registries))
