"""RQ without pickle: a msgpack serializer, a job class that runs allow-listed functions only, one queue per client.

fedqueue's lease determines the life of a job. RQ delivers the job to a worker and lists it in RQ's tools. RQ applies no
timeout, does not retry, and stores no result.
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
from fedqueue.protocol.messages import Order
from fedqueue.protocol.msgpack import MAX_MESSAGE, pack, unpack

TRAIN = "fedqueue_worker.job_runner.train"
"""The only function name that a job may contain; a worker looks it up in its allow-list and imports nothing."""

FAILED_SECONDS = 3600  # for which RQ lists a job that it counts as failed (foreign, malformed)


class Serializer:
    """A serializer for RQ: msgpack of plain values, bounded in size."""

    @staticmethod
    def dumps(obj: Any) -> bytes:
        """`obj` as msgpack; raises WireError as `pack`."""
        return pack(obj)

    @staticmethod
    def loads(data: bytes) -> Any:
        """The inverse of `dumps`; raises WireError as `unpack`."""
        return unpack(data)


class NoTimeout(BaseDeathPenalty):
    """No timeout of RQ's: there is no time limit while training makes progress, and the lease ends a stalled job."""

    def setup_death_penalty(self) -> None:
        """Set no alarm."""

    def cancel_death_penalty(self) -> None:
        """No-op: no alarm was set."""


class TrainingJob(Job):
    """An RQ job that imports nothing: its function is looked up in `allowed`, and its callbacks never run."""

    allowed: Mapping[str, Callable[..., Any]] = {}

    @property
    def func(self) -> Callable[..., Any]:
        """The function that the job names; raises WireError for a name that is not in `allowed`."""
        name = self.func_name or ""
        if self.instance is not None or name not in self.allowed:
            raise WireError(f"job {self.id} asks for {name!r}; allowed: {', '.join(self.allowed) or 'nothing'}")
        return self.allowed[name]

    @property
    def success_callback(self) -> None:
        """None: a job calls nothing but its function."""
        return None

    @property
    def failure_callback(self) -> None:
        """None: a job calls nothing but its function."""
        return None

    @property
    def stopped_callback(self) -> None:
        """None: a job calls nothing but its function."""
        return None

    def restore(self, raw_data: Mapping[bytes, bytes]) -> Any:
        """RQ's, which decompresses two fields; raises WireError if one would become larger than a message."""
        for field in (b"data", b"exc_info"):
            self._inflated(field.decode(), raw_data.get(field, b""))
        return super().restore(raw_data)

    def _inflated(self, field: str, data: bytes) -> bytes:
        try:
            inflated = zlib.decompressobj().decompress(data, MAX_MESSAGE + 1)
        except zlib.error:  # not compressed: RQ uses it as it is
            return data
        if len(inflated) > MAX_MESSAGE:
            raise WireError(f"job {self.id}: {field} inflates to more than {MAX_MESSAGE} bytes")
        return inflated

    def send_webhooks(self, *args: Any, **kwargs: Any) -> None:
        """No-op: a job must not make a worker request a URL."""


class TakenJob(TrainingJob):
    """A job as its worker reads it: only its queue and its call are read from RQ's record."""

    def refresh(self) -> None:
        """Read the record; raises NoSuchJobError if the record is missing or contains no call."""
        record = cast(dict[bytes, bytes], self.connection.hgetall(self.key))
        if b"data" not in record:
            raise NoSuchJobError(f"no such job: {self.id}")
        self.origin, self.data = as_text(record.get(b"origin", b"")), self._inflated("data", record[b"data"])
        self.failure_ttl = FAILED_SECONDS


def job_class(train: Callable[..., Any]) -> type[TakenJob]:
    """The job class of one worker: the name `TRAIN` calls `train`, and any other name is refused."""
    return type("TakenJob", (TakenJob,), {"allowed": {TRAIN: train}})


def client_queue(client: redis.Redis, name: str, cls: type[Job] = TrainingJob) -> Queue:
    """RQ's queue of that name, without pickle and without timeouts."""
    return Queue(name, connection=client, serializer=Serializer, job_class=cls, death_penalty_class=NoTimeout)


@dataclass(frozen=True)
class RqJobRecord:
    """RQ's record of a queued job: its keys, and its fields as a flat list of name, value, name, value, …"""

    job: str
    key: str
    queue: str
    fields: list[Any]


def queue_class(queues: Iterable[Queue]) -> type[Queue]:
    """A Queue class that reuses a worker's own queues; RQ would construct a queue for each job."""
    served = {queue.key: queue for queue in queues}

    class Served(Queue):
        @classmethod
        def from_queue_key(cls, queue_key: str, *args: Any, **kwargs: Any) -> Queue:
            return served[queue_key]

    return Served


class Queues:
    """Makes RQ's records of jobs, for a coordinator to enqueue."""

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
        )  # reused for every record: constructing a Job takes as long as everything else

    def record(self, queue: str, order: Order, envelope: bytes | None = None) -> RqJobRecord:
        """What RQ would write to enqueue the order, or its envelope; the first one of a queue registers the queue."""
        job = self._job
        job.id, job.origin, job.description = order.job, queue, f"train {order.client} for {order.run}"
        job.kwargs = {"order": order.model_dump() if envelope is None else envelope}
        job.created_at = job.enqueued_at = now()
        fields = [item for name, value in job.to_dict().items() if value != "" for item in (name, value)]
        key = f"{Queue.redis_queue_namespace_prefix}{queue}"
        if queue not in self._listed:  # once is enough, though RQ repeats it for each job
            self._client.sadd(Queue.redis_queues_keys, key)
            self._listed.add(queue)
        return RqJobRecord(job.id, job.key, key, fields)


def forget(client: redis.Redis, queue: str, job: str) -> None:
    """Delete a job from RQ: its record, and its entries in the queue, registries and executions."""
    rq_queue = client_queue(client, queue)
    try:
        TrainingJob.fetch(job, connection=client, serializer=Serializer).delete()
    except (NoSuchJobError, InvalidJobOperation):  # its worker has deleted it meanwhile
        pass
    except (redis.ConnectionError, redis.TimeoutError):
        raise
    except Exception:  # the key contains no valid record of RQ
        client.delete(TrainingJob.key_for(job))
    for key in (rq_queue.key, rq_queue.intermediate_queue_key):
        client.lrem(key, 0, job)


def delete_queue(client: redis.Redis, name: str) -> None:
    """Delete a client's queue, with every job in it and in its registries."""
    queue = client_queue(client, name)
    registries = (queue.started_job_registry, queue.failed_job_registry, queue.finished_job_registry)
    jobs = {job for registry in registries for job in registry.get_job_ids(cleanup=False)}
    for job in jobs:
        forget(client, name, job)
    queue.delete(delete_jobs=True)
    client.delete(queue.intermediate_queue_key, *(r.key for r in registries))
