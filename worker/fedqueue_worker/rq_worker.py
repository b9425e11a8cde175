"""RQ's worker for training jobs: one process, no timeouts, no maintenance, few commands for a short job."""

from __future__ import annotations

import contextlib
import signal
import time
import uuid
from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from types import FrameType
from typing import Any

import redis
import structlog
from redis.client import Pipeline
from rq import Queue, SimpleWorker
from rq.defaults import DEFAULT_WORKER_TTL
from rq.exceptions import StopRequested
from rq.executions import Execution
from rq.job import Job
from rq.registry import StartedJobRegistry
from rq.utils import now
from rq.worker import WorkerStatus

from fedqueue.exit_codes import stop_signals
from fedqueue.transport.connection import limit_retries
from fedqueue.transport.retry import transient_reason
from fedqueue.transport.rq_jobs import NoTimeout, Serializer, client_queue, forget, job_class, queue_class
from fedqueue.transport.zero_copy import Command
from fedqueue_worker.job_runner import JobRunner

log = structlog.get_logger("fedqueue.worker")

RQ_HEARTBEAT = timedelta(seconds=10)
SHOWN_SECONDS = 1.0  # a job that takes longer is shown as running by RQ's tools
RQ_WORKER_SECONDS = 20
"""RQ's worker_ttl. Blocking reads are 15 s shorter, which bounds how long a signal waits that came just before one."""


class TrainingWorker(SimpleWorker):
    """Takes jobs out of the clients' queues and has `runner` train them; the job's lease replaces RQ's timeouts.

    A job's start is written to Redis only after SHOWN_SECONDS: a shorter one needs half the commands.
    """

    death_penalty_class = NoTimeout

    def __init__(self, runner: JobRunner, connection: redis.Redis, queues: Sequence[str], name: str) -> None:
        cls = job_class(self._train)
        super().__init__(
            [client_queue(connection, queue, cls) for queue in queues],
            name=name,
            connection=connection,
            job_class=cls,
            serializer=Serializer,
            worker_ttl=RQ_WORKER_SECONDS,
        )
        self.queue_class = queue_class(self.queues)
        self.runner = runner
        self.burst_done = False
        """Whether a worker in burst mode has found its queues empty, or itself suspended."""
        self.interrupted_by: redis.RedisError | None = None
        """The error that ended RQ's loop."""
        self._not_shown: tuple[Job, Execution] | None = None  # what runs and is not written to Redis yet
        self._record_deleted = False  # of the last job, by the post of its update
        self._taken_from: Queue | None = None
        self._started_at = 0.0
        self._suspension_checked_at: datetime | None = None

    def _train(self, order: bytes | dict[str, Any]) -> None:
        """The one function that a job may call."""
        self._record_deleted = self.runner.train(order, self._show_if_long, self._commands_for_post)

    # Taking jobs

    @property
    def should_run_maintenance_tasks(self) -> bool:
        """False: the coordinator cleans up after lost jobs."""
        return False

    def subscribe(self) -> None:
        """Subscribe to no channel: otherwise every writer to Redis could stop or kill this process."""

    def dequeue_job_and_maintain_ttl(
        self, timeout: int | None, max_idle_time: int | None = None
    ) -> tuple[Job, Queue] | None:
        """As in RQ, but an unreadable job is dropped and the next one taken. RQ would end the process."""
        while True:
            try:
                with self._interruptible():
                    taken = super().dequeue_job_and_maintain_ttl(timeout, max_idle_time)
            except Exception as error:
                unreadable = hasattr(error, "job_id") or isinstance(error, UnicodeDecodeError)  # RQ adds the id
                if isinstance(error, StopRequested) or not unreadable:
                    raise
                self._drop(getattr(error, "job_id", ""), getattr(error, "queue", None), error)
            else:
                self.burst_done = taken is None
                return taken

    def check_for_suspension(self, burst: bool) -> None:
        """As in RQ, but not before each job: `rq suspend` takes effect within RQ_HEARTBEAT."""
        if self._suspension_checked_at is None or now() - self._suspension_checked_at > RQ_HEARTBEAT:
            self._suspension_checked_at = now()
            try:
                with self._interruptible():
                    super().check_for_suspension(burst)
            except StopRequested:
                self.burst_done = burst and self.interrupted_by is None
                raise

    def execute_job(self, job: Job, queue: Queue) -> None:
        """As in RQ, but a job that breaks RQ's own bookkeeping is dropped. RQ would end the process."""
        self._taken_from = queue
        try:
            super().execute_job(job, queue)
        except Exception as error:
            if isinstance(error, redis.RedisError) and transient_reason(error):
                self.interrupted_by = error
                raise StopRequested from error
            self._drop(job.id, queue, error)
        if self.interrupted_by:
            raise StopRequested

    @contextlib.contextmanager
    def _interruptible(self) -> Iterator[None]:
        """End RQ's loop at an error of Redis, and keep the error. RQ would log its traceback and drop it."""
        try:
            yield
        except redis.RedisError as error:
            if hasattr(error, "job_id") and not transient_reason(error):  # the job's record cannot be read
                raise
            self.interrupted_by = error
            raise StopRequested from error

    def _drop(self, job: str, queue: Queue | None, error: Exception) -> None:
        log.warning("dropping a job that fedqueue did not write", job=job, error=f"{type(error).__name__}: {error}")
        if queue:
            forget(self.connection, queue.name, job)

    # What RQ's tools see of a running job

    def get_heartbeat_ttl(self, job: Job, working_time: float = 0.0) -> int:
        """Seconds for which RQ's tools show the job as running, whatever its record asks for."""
        return DEFAULT_WORKER_TTL

    def prepare_execution(self, job: Job) -> Execution:
        """Note the start in this process only. `_show` writes it to Redis if the job takes long."""
        execution = Execution(uuid.uuid4().hex, job.id, self.connection, self.name)
        self._not_shown, self._started_at, self._state = (job, execution), time.monotonic(), WorkerStatus.BUSY
        return execution

    def prepare_job_execution(self, job: Job, remove_from_intermediate_queue: bool = False) -> None:
        """No-op: `_show` does this for a job that takes long, and a shorter one does not need it."""

    def _show_if_long(self) -> None:
        """Called each time that training has made progress."""
        if self._not_shown and time.monotonic() - self._started_at >= SHOWN_SECONDS:
            self._show()

    def _show(self) -> None:
        """Write what RQ writes when a job starts."""
        if self._not_shown is None:
            return
        (job, execution), self._not_shown = self._not_shown, None
        with self.connection.pipeline() as pipeline:
            pipeline.exists(job.key)
            shown = Execution.create(job, self.get_heartbeat_ttl(job), pipeline=pipeline, worker_name=self.name)
            execution.id = shown.id
            self.executions[execution.id] = execution
            super().set_state(WorkerStatus.BUSY, pipeline)
            job.prepare_for_execution(self.name, pipeline=pipeline)
            pipeline.persist(job.key)
            pipeline.lrem(Queue(job.origin, connection=self.connection).intermediate_queue_key, 1, job.id)
            exists = pipeline.execute()[0]
            if not exists:  # the coordinator has just closed the job: this must not bring its record back
                pipeline.delete(job.key)
                self.cleanup_execution(job, pipeline, execution)
                pipeline.execute()

    # The end of a job

    def handle_execution_ended(self, job: Job, queue: Queue, heartbeat_ttl: int) -> None:
        """As in RQ, without a last heartbeat, which would bring back the record of a job that was closed meanwhile."""
        job.ended_at = now()

    def handle_job_success(
        self, job: Job, queue: Queue, started_job_registry: StartedJobRegistry, execution: Execution
    ) -> None:
        """Delete the job's record in one exchange. RQ takes ten, for results, dependents and repeats."""
        shown, self._not_shown = self._not_shown is None, None
        if not shown:
            self._state = WorkerStatus.IDLE
        if self._record_deleted:
            return
        with self.connection.pipeline(transaction=shown) as pipeline:
            if shown:
                self.set_state(WorkerStatus.IDLE, pipeline)
                self.cleanup_execution(job, pipeline, execution)
            for command in self._success_commands(job):
                pipeline.execute_command(*command)  # type: ignore[no-untyped-call]
            try:
                pipeline.execute()
            except redis.RedisError as error:  # RQ would log a traceback, and mark a trained job as failed
                if transient_reason(error):
                    self.interrupted_by = error  # ends RQ's loop after this job
                else:
                    self._drop(job.id, queue, error)

    def _commands_for_post(self) -> list[Command]:
        """The commands that end a job which is not shown. Sent with the post, they save an exchange for each job."""
        return self._success_commands(self._not_shown[0]) if self._not_shown else []

    def _success_commands(self, job: Job) -> list[Command]:
        """What RQ writes about a job that went well."""
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
        """As in RQ, which needs a job that is shown."""
        self._show()
        super().handle_job_failure(job, queue, *args, **kwargs)

    # State, heartbeat, signals

    def set_state(self, state: str, pipeline: Pipeline | None = None) -> None:
        """As in RQ; nothing is written where the state has not changed."""
        if state != self.get_state():
            super().set_state(state, pipeline)

    def heartbeat(self, timeout: int | None = None, pipeline: Pipeline | None = None) -> None:
        """As in RQ, but outside a pipeline at most once in RQ_HEARTBEAT. RQ sends four for each job.

        RQ calls this in every iteration of its wait for a job: a stop whose exception was lost takes effect here.
        """
        if pipeline is None and self.runner.told_to_stop:
            raise StopRequested
        if pipeline is not None or self.last_heartbeat is None or now() - self.last_heartbeat > RQ_HEARTBEAT:
            super().heartbeat(timeout, pipeline)

    def _install_signal_handlers(self) -> None:
        for signum in stop_signals():
            signal.signal(signum, self.request_stop)

    def request_stop(self, signum: int, frame: FrameType | None) -> None:
        """Handle SIGTERM, SIGINT or SIGHUP: hand back the running job at once, or stop waiting for one.

        The exception raised here may be lost (redis-py's telemetry drops every exception that is raised inside it),
        so the stop is recorded as well.
        """
        if self.runner.told_to_stop:
            return  # an earlier signal has already begun the stop
        self._stop_requested = True
        limit_retries(self.connection)
        self.runner.stop()
        if self.get_state() != WorkerStatus.BUSY:
            raise StopRequested
