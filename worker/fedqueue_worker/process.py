"""A long-lived RQ worker that knows its clients: it joins the run, loads their data, and trains their jobs."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
import uuid
from collections.abc import Sequence
from datetime import datetime, timedelta
from types import FrameType
from typing import Any

import redis
import structlog
import torch
from redis.client import Pipeline
from rq import Queue, SimpleWorker
from rq.defaults import DEFAULT_WORKER_TTL
from rq.exceptions import StopRequested
from rq.executions import Execution
from rq.job import Job
from rq.registry import StartedJobRegistry
from rq.utils import now
from rq.worker import DequeueStrategy, WorkerStatus

from fedqueue.config.loading import Config, parse_config
from fedqueue.errors import ClientTaken, ConfigurationError, ManifestMismatch, RunNotFound, SignatureError
from fedqueue.protocol.keys import client_tag
from fedqueue.protocol.messages import Registration
from fedqueue.task import Task
from fedqueue.tensors.frame import Manifest
from fedqueue.terminal import DONE
from fedqueue.transport.connection import limit_retries
from fedqueue.transport.retry import RedisRetry, transient_reason
from fedqueue.transport.rq_jobs import NoTimeout, Serializer, client_queue, forget, job_class, queue_class
from fedqueue.transport.store import RunInfo
from fedqueue.transport.worker_store import WorkerStore
from fedqueue.transport.zero_copy import Command
from fedqueue_worker.egress_log import SILENT, EgressLog
from fedqueue_worker.heartbeat import Heartbeat
from fedqueue_worker.job_runner import HandBack, JobRunner
from fedqueue_worker.policy import ANYTHING, Policy

log = structlog.get_logger("fedqueue.worker")

RQ_HEARTBEAT = timedelta(seconds=10)
SHOWN_SECONDS = 1.0  # a job that takes longer is shown as running by RQ's tools
RQ_WORKER_SECONDS = 20  # blocking reads are 15 s shorter: as long as a signal waits that came just before one began


class TrainingWorker(SimpleWorker):
    """RQ's worker in one process, without RQ's timeouts and maintenance: the lease owns the life of a job."""

    death_penalty_class = NoTimeout

    def __init__(self, *args: Any, round: JobRunner, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.queue_class = queue_class(self.queues)
        self.round = round
        round.on_progress, round.closing = self._show_if_long, self._closing
        self._hidden: tuple[Job, Execution] | None = None  # what runs and is not shown yet
        self._taken_from: Queue | None = None
        self._began = 0.0
        self._asked_for_suspension: datetime | None = None

    @property
    def should_run_maintenance_tasks(self) -> bool:
        return False

    def subscribe(self) -> None:
        """No remote commands: whoever can write to Redis cannot stop or kill this process."""

    def dequeue_job_and_maintain_ttl(
        self, timeout: int | None, max_idle_time: int | None = None
    ) -> tuple[Job, Queue] | None:
        """As RQ's; what is no readable job is dropped, and the next one taken: RQ would end the process."""
        while True:
            try:
                return super().dequeue_job_and_maintain_ttl(timeout, max_idle_time)
            except Exception as error:
                unreadable = hasattr(error, "job_id") or isinstance(error, UnicodeDecodeError)  # RQ notes the id on it
                if isinstance(error, StopRequested) or is_outage(error) or not unreadable:
                    raise
                self._drop(getattr(error, "job_id", ""), getattr(error, "queue", None), error)

    def execute_job(self, job: Job, queue: Queue) -> None:
        """As RQ's; a job that breaks RQ's own bookkeeping is dropped: RQ would end the process."""
        self._taken_from = queue
        try:
            super().execute_job(job, queue)
        except Exception as error:
            if is_outage(error):
                raise
            self._drop(job.id, queue, error)

    def _drop(self, job: str, queue: Queue | None, error: Exception) -> None:
        log.warning("not a job of fedqueue's: dropped", job=job, error=f"{type(error).__name__}: {error}")
        if queue:
            forget(self.connection, queue.name, job)

    def get_heartbeat_ttl(self, job: Job, working_time: float = 0.0) -> int:
        """Seconds for which RQ's tools show the job as running; whatever its record says."""
        return DEFAULT_WORKER_TTL

    def handle_execution_ended(self, job: Job, queue: Queue, heartbeat_ttl: int) -> None:
        """As RQ's, without its last heartbeat: that would bring back the record of a job closed meanwhile."""
        job.ended_at = now()

    def handle_job_success(
        self, job: Job, queue: Queue, started_job_registry: StartedJobRegistry, execution: Execution
    ) -> None:
        """In one step, where RQ takes ten: our jobs have no result, no dependents, no repeats."""
        shown, self._hidden = self._hidden is None, None
        if not shown:
            self._state = WorkerStatus.IDLE
        if self.round.closed:
            return
        with self.connection.pipeline(transaction=shown) as pipeline:
            if shown:
                self.set_state(WorkerStatus.IDLE, pipeline)
                self.cleanup_execution(job, pipeline, execution)
            for command in self._ending(job):
                pipeline.execute_command(*command)  # type: ignore[no-untyped-call]
            try:
                pipeline.execute()
            except redis.ResponseError as error:  # RQ would call what was trained failed, and keep its record
                if is_outage(error):
                    raise
                self._drop(job.id, queue, error)

    def _closing(self) -> list[Command]:
        """A job that is not shown ends with its post: that is one exchange less for each."""
        return self._ending(self._hidden[0]) if self._hidden else []

    def _ending(self, job: Job) -> list[Command]:
        """What RQ notes of a job that went well."""
        assert self._taken_from
        assert job.started_at
        worked = ((job.ended_at or now()) - job.started_at).total_seconds()
        return [
            ("HINCRBY", self.key, "successful_job_count", 1),
            ("HINCRBYFLOAT", self.key, "total_working_time", worked),
            ("DEL", job.key),
            ("LREM", self._taken_from.intermediate_queue_key, 1, job.id),
        ]

    def handle_job_failure(self, job: Job, queue: Queue, *args: Any, **kwargs: Any) -> None:
        """As RQ's, of a job that is shown."""
        self._show()
        super().handle_job_failure(job, queue, *args, **kwargs)

    def prepare_execution(self, job: Job) -> Execution:
        """Only in this process: what RQ writes of a job is half the commands of one that is soon over."""
        execution = Execution(uuid.uuid4().hex, job.id, self.connection, self.name)
        self._hidden, self._began, self._state = (job, execution), time.monotonic(), WorkerStatus.BUSY
        return execution

    def _show_if_long(self) -> None:
        """Called whenever training has made progress."""
        if self._hidden and time.monotonic() - self._began >= SHOWN_SECONDS:
            self._show()

    def _show(self) -> None:
        """Write down, as RQ does, what runs."""
        if self._hidden is None:
            return
        (job, execution), self._hidden = self._hidden, None
        with self.connection.pipeline() as pipeline:
            pipeline.exists(job.key)
            shown = Execution.create(job, self.get_heartbeat_ttl(job), pipeline=pipeline, worker_name=self.name)
            execution.id = shown.id
            self.executions[execution.id] = execution
            super().set_state(WorkerStatus.BUSY, pipeline)
            job.prepare_for_execution(self.name, pipeline=pipeline)
            pipeline.persist(job.key)
            pipeline.lrem(Queue(job.origin, connection=self.connection).intermediate_queue_key, 1, job.id)
            known = pipeline.execute()[0]
            if not known:  # its coordinator has just given it up: nothing of it may stay behind
                pipeline.delete(job.key)
                self.cleanup_execution(job, pipeline, execution)
                pipeline.execute()

    def prepare_job_execution(self, job: Job, remove_from_intermediate_queue: bool = False) -> None:
        """Done."""

    def check_for_suspension(self, burst: bool) -> None:
        """As RQ's, which asks before each job: here `rq suspend` is heard within some seconds."""
        if self._asked_for_suspension is None or now() - self._asked_for_suspension > RQ_HEARTBEAT:
            self._asked_for_suspension = now()
            super().check_for_suspension(burst)

    def set_state(self, state: str, pipeline: Pipeline | None = None) -> None:
        """As RQ's, which says it again and again."""
        if state != self.get_state():
            super().set_state(state, pipeline)

    def heartbeat(self, timeout: int | None = None, pipeline: Pipeline | None = None) -> None:
        """As RQ's, which beats four times for each job: of those apart from a pipeline, one is enough now and then.

        RQ calls it in each turn of its wait for a job: a stop that was not heard in the last one is heard here.
        """
        if pipeline is None and self.round.told_to_stop:
            raise StopRequested
        if pipeline is not None or self.last_heartbeat is None or now() - self.last_heartbeat > RQ_HEARTBEAT:
            super().heartbeat(timeout, pipeline)

    def request_stop(self, signum: int, frame: FrameType | None) -> None:
        """SIGTERM or SIGINT: hand back the job at once, or stop waiting for one.

        What is raised here may be lost (redis-py's telemetry, for one, drops all that is raised inside it), so it is
        noted as well.
        """
        if self.round.told_to_stop:
            return  # it is on its way out
        self._stop_requested = self.round.told_to_stop = True
        limit_retries(self.connection)
        if self.round.interruptible:
            self.round.interruptible = False
            raise HandBack
        if self.get_state() != WorkerStatus.BUSY:
            raise StopRequested


class Worker:
    """One worker process of a run."""

    def __init__(
        self,
        config: Config,
        task: Task,
        store: WorkerStore,
        policy: Policy = ANYTHING,
        egress_log: EgressLog = SILENT,
    ) -> None:
        self.config, self.task, self.store = config, task, store
        self.policy, self.egress_log = policy, egress_log
        self.clients: list[str] = []
        self.ended_because = ""
        self._heartbeat: Heartbeat | None = None
        self._told_to_leave = False

    def run(self, candidates: Sequence[Sequence[str]], once: bool = False) -> str:
        """Serve one client of each list of candidates until the run ends or a signal comes; returns why it ended.

        Raises ClientTaken where other workers serve all candidates, ManifestMismatch where the task's model is not
        the run's, SignatureError where the run is not, or not any more, what its coordinator signed, and PolicyRefusal
        where this site does not agree to the task.
        """
        self.policy.agree_to_task(self.config.task.entrypoint)
        for signum in (signal.SIGTERM, signal.SIGINT):  # until RQ's own: while it waits, joins and loads data
            signal.signal(signum, self._leave)
        info = self._wait_for_the_run()
        if info.state != "running":
            return f"the run has ended: {info.stopped_because}"
        identity = self.store.identity
        if identity:
            identity.enter(info)
        elif info.descriptor:
            raise ConfigurationError("security.signatures", "off", f"run {info.run!r} is signed: its workers need keys")
        torch.set_num_threads(self.config.training.threads)
        model = self.task.model()
        torch.optim.SGD(model.parameters(), lr=0.1)  # the first optimizer imports for a second: now, not in a job
        try:
            Manifest.unpack(info.manifest).require(Manifest.from_module(model))
        except ManifestMismatch as error:
            raise ManifestMismatch(f"this worker's task does not fit run {info.run!r}: {error}") from None
        run_config = parse_config(info.config)
        dispatch = run_config.dispatch
        self.clients = self._join(candidates, dispatch.lease_seconds)
        self._heartbeat = heartbeat = Heartbeat(
            self.store, self.clients, dispatch.lease_seconds, dispatch.stall_seconds, self._go
        )
        heartbeat.start()
        try:
            round_ = JobRunner(
                self.store, self.task, model, heartbeat, dispatch.lease_seconds, run_config.keeps_bases,
                self.config.clients.slowdown, self.policy, self.egress_log, run_config.compression,
            )  # fmt: skip
            for client in self.clients:
                data = self.task.train_data(self.config.clients.client(client))
                round_.load(client, data)
                registration = Registration(client=client, examples=int(self.task.num_examples(data)))
                self.egress_log.registers(registration)
                heartbeat.register(registration)
            log.info("ready", run=info.run, clients=self.clients, pid=os.getpid())
            self._work(round_, once)
        finally:
            limit_retries(self.store.redis)
            heartbeat.stop()
            with contextlib.suppress(redis.RedisError):  # then the clients' aliveness runs out
                self.store.leave(self.clients)
        if identity and identity.broken:
            raise SignatureError(identity.broken)
        return self.ended_because or "stopped"

    def _wait_for_the_run(self) -> RunInfo:
        said, retry = False, RedisRetry(lambda: self._told_to_leave)
        while not self._told_to_leave:
            try:
                info = retry.call(self.store.info)
            except RunNotFound:
                info = None
            if info and info.version >= 0:
                return info
            if not said:
                log.info("waiting for a coordinator to start the run", run=self.store.run)
                said = True
            time.sleep(0.2)
        raise SystemExit(DONE)

    def _join(self, candidates: Sequence[Sequence[str]], lease_seconds: float) -> list[str]:
        clients: list[str] = []
        retry = RedisRetry(lambda: self._told_to_leave)
        for options in candidates:
            free = [c for c in options if c not in clients]
            client = retry.call(lambda free=free: self.store.join(free, lease_seconds))  # type: ignore[misc]
            if client is None:
                self.store.leave(clients)
                raise ClientTaken(
                    f"client {options[0]} is served by another worker"
                    if len(options) == 1
                    else f"all {len(options)} partitions are served by other workers"
                )
            clients.append(client)
        return clients

    def _work(self, round_: JobRunner, once: bool) -> None:
        """RQ's loop; started again where an outage in the middle of its bookkeeping ended it."""
        round_.told_to_stop = self._told_to_leave
        retry = RedisRetry()
        with contextlib.suppress(StopRequested):  # between two of RQ's loops
            while not round_.told_to_stop:
                interrupted: redis.RedisError = redis.ConnectionError("RQ's loop has ended by itself")
                try:
                    self._make_rq_worker(round_).work(
                        logging_level="WARNING",
                        max_jobs=1 if once else None,
                        dequeue_strategy=DequeueStrategy.ROUND_ROBIN,
                    )
                except redis.RedisError as error:
                    interrupted = error
                if round_.told_to_stop or (once and round_.jobs):  # nothing more can be said to a server that is away
                    return
                log.warning("RQ's loop is started again", because=str(interrupted))
                retry.wait(interrupted)

    def _make_rq_worker(self, round_: JobRunner) -> TrainingWorker:
        connection = self.store.redis
        cls = job_class(round_.train)
        return TrainingWorker(
            [client_queue(connection, self.store.keys.queue(client), cls) for client in self.clients],
            name=f"fedqueue-{self.store.run}-{uuid.uuid4().hex[:12]}-{client_tag(self.store.run, self.clients[0])}",
            connection=connection,
            job_class=cls,
            serializer=Serializer,
            worker_ttl=RQ_WORKER_SECONDS,
            round=round_,
        )

    def _leave(self, signum: int, frame: FrameType | None) -> None:
        """SIGTERM or SIGINT before the first job; noted as well, since what is raised may be lost in a finalizer."""
        if not self._told_to_leave:
            self._told_to_leave = True
            raise SystemExit(DONE)

    def _go(self, because: str) -> None:
        """Called by the heartbeat: stop as on SIGTERM, so that whatever waits is interrupted."""
        self.ended_because = because
        main = threading.main_thread().ident
        assert main is not None
        signal.pthread_kill(main, signal.SIGTERM)


def is_outage(error: Exception) -> bool:
    return isinstance(error, redis.RedisError) and bool(transient_reason(error))


def new_token() -> str:
    """A name that tells this worker process from every other one."""
    return uuid.uuid4().hex
