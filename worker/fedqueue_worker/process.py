"""One worker process: it joins the run, loads its clients' data, and serves their training jobs. Read `run` first."""

from __future__ import annotations

import contextlib
import difflib
import os
import signal
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

import redis
import structlog
import torch
from rq.exceptions import StopRequested
from rq.worker import DequeueStrategy

from fedqueue.config.loading import parse_config
from fedqueue.config.schema import Config
from fedqueue.errors import (
    BudgetSpent,
    ClientTaken,
    ConfigurationError,
    LoadFailed,
    ManifestMismatch,
    NoExamples,
    PolicyRefusal,
    RunNotFound,
    SignatureError,
    TaskError,
)
from fedqueue.exception_text import exception_text
from fedqueue.exit_codes import DONE, stop_signals
from fedqueue.local_update import load_data
from fedqueue.private_training import check_example_privacy
from fedqueue.protocol.keys import client_tag
from fedqueue.protocol.messages import NO_EXAMPLES, SITE_POLICY, Registration, Unavailable
from fedqueue.protocol.run_info import RunInfo
from fedqueue.secure.masked_update import Masking
from fedqueue.task import Task, make_model, prepare_task
from fedqueue.tensors.manifest import Manifest
from fedqueue.tracing import start_tracing
from fedqueue.training import check_device, check_training, set_seed
from fedqueue.transport.connection import limit_retries
from fedqueue.transport.retry import RedisRetry, transient_reason
from fedqueue.transport.worker_store import WorkerStore
from fedqueue_worker.egress_log import NO_EGRESS_LOG, EgressLog
from fedqueue_worker.heartbeat import Heartbeat
from fedqueue_worker.job_runner import JobRunner
from fedqueue_worker.policy import ALLOW_ALL, NoPart, Policy
from fedqueue_worker.retrying_store import RetryingStore
from fedqueue_worker.rq_worker import TrainingWorker
from fedqueue_worker.site_statistics import SiteStatistics
from fedqueue_worker.told_errors import NUMBER, told_failure, told_refusal
from fedqueue_worker.worker_metrics import UNOBSERVED, WorkerObserver

log = structlog.get_logger("fedqueue.worker")

POLL_SECONDS = 0.2  # between two looks whether the run has begun


class Worker:
    """One worker process of a run."""

    def __init__(
        self,
        config: Config,
        task: Task,
        store: WorkerStore,
        policy: Policy = ALLOW_ALL,
        egress_log: EgressLog = NO_EGRESS_LOG,
        observer: WorkerObserver = UNOBSERVED,
    ) -> None:
        """`observer` is told of the jobs."""
        self._observer = observer
        self.config, self.task, self.store = config, task, store
        self.policy, self.egress_log = policy, egress_log
        self.clients: list[str] = []
        self.ended_because = ""
        self.without_update: Mapping[str, str] = {}
        """Client → why no update of it was accepted; complete once `run` has returned."""
        self.privacy_spent: list[str] = []
        """A line for each client whose rows are protected; complete once `run` has returned."""
        self._told_to_stop = False
        self._failed_loads: dict[str, str] = {}  # client → why its data cannot be loaded
        self._retrying = RetryingStore(store, lambda: self._told_to_stop)

    def run(
        self,
        candidates: Sequence[Sequence[str]],
        max_jobs: int | None = None,
        burst: bool = False,
        new_clients: bool = False,
    ) -> str:
        """Serve one client of each list of candidates until the run ends or a signal comes; returns why it ended.

        With `max_jobs`, ends after that many jobs; with `burst`, ends once the clients' queues are empty. A client
        whose data cannot be loaded is reported and left out. With `new_clients`, a candidate of an unsigned run may be
        one that no configuration lists.

        Raises ConfigurationError for another candidate than the run's clients, LoadFailed where no client could be
        loaded, ClientTaken where other workers serve all candidates, ManifestMismatch where the task's model differs
        from the run's, SignatureError where the run's messages are not signed by its coordinator, and PolicyRefusal
        where this site's policy does not allow the task.
        """
        self.policy.check_task(self.config.task.entrypoint)
        for signum in stop_signals():  # until RQ installs its own: while waiting, joining, loading
            signal.signal(signum, self._on_signal)
        info = self._wait_for_run(candidates)
        if info.state != "running":
            return f"the run has ended: {info.stopped_because}"
        identity = self.store.identity
        if identity:
            identity.enter(info)
        elif info.descriptor:
            raise ConfigurationError(
                "security.signatures", "off", f"run {info.run!r} is signed", "set it to 'required'; workers need keys"
            )
        run_config = parse_config(info.config)
        if identity is None and not new_clients:  # in a signed run, the keys say who may take part
            self._require_known(candidates, run_config)
        secure = run_config.secure
        if identity and secure.on:
            identity.require_keepers(secure.keepers)
        prepare_task(self.task, run_config)
        tracing = start_tracing(self.config.opentelemetry.traces, "fedqueue-worker")
        model = self._make_model(info, run_config)
        masking = Masking(run_config, Manifest.unpack(info.manifest)) if secure.on else None
        dispatch = run_config.dispatch
        self.clients = self._join(candidates, dispatch.lease_seconds)
        heartbeat = Heartbeat(
            self.store, self.clients, dispatch.lease_seconds, dispatch.stall_seconds, self._stop_because
        )
        runner = JobRunner(
            self.store, self.task, model, heartbeat, dispatch.lease_seconds, run_config.keeps_bases,
            self.config.clients.slowdown, self.policy, self.egress_log, run_config.compression,
            run_config.aggregation, self.config.training, run_config, masking, Path(self.config.privacy.folder),
            tracing, self._observer,
        )  # fmt: skip
        heartbeat.start()
        try:
            self._load(runner, heartbeat, run_config)
            log.info("ready", run=info.run, clients=self.clients, pid=os.getpid())
            self._serve(runner, max_jobs, burst)
        finally:
            self.without_update = runner.without_update()
            self.privacy_spent = runner.privacy_spent()
            limit_retries(self.store.redis)
            heartbeat.stop()
            with contextlib.suppress(redis.RedisError):  # then the coordinator expires the clients
                self.store.leave(self.clients)
            tracing.stop()
        if identity and identity.broken:
            raise SignatureError(identity.broken)
        return self.ended_because or "stopped"

    def _require_known(self, candidates: Sequence[Sequence[str]], run_config: Config) -> None:
        """Raise ConfigurationError for a client that neither the run's configuration nor this site's lists."""
        known = dict.fromkeys([*run_config.clients.ids, *self.config.clients.ids])
        for client in (client for options in candidates for client in options if client not in known):
            near = difflib.get_close_matches(client, known, n=1)
            meant = f"did you mean {near[0]!r}? Otherwise pass" if near else "pass"
            problem = f"is not one of the {len(known)} clients of run {self.store.run!r}"
            raise ConfigurationError("--client", client, problem, f"{meant} --new-client to add a client to the run")

    def _wait_for_run(self, candidates: Sequence[Sequence[str]]) -> RunInfo:
        """The run's state once it has a first version; until then, questions about the data are answered.

        Raises SystemExit where a signal comes before that.
        """
        logged = False
        statistics = SiteStatistics(self.config, self.task, self._retrying, self.policy, self.egress_log)
        while not self._told_to_stop:
            try:
                info = self._retrying.info()
            except RunNotFound:
                info = None
            if info and info.version >= 0:
                return info
            if not logged:
                log.info("waiting for a coordinator to start the run", run=self.store.run)
                logged = True
            statistics.answer_if_asked(candidates, lambda: self._told_to_stop)
            time.sleep(POLL_SECONDS)
        raise SystemExit(DONE)

    def _make_model(self, info: RunInfo, run_config: Config) -> torch.nn.Module:
        """The task's model, which has to match the run's manifest, and this machine's device, which has to exist."""
        torch.set_num_threads(self.config.training.threads)
        device = check_device(self.config.training.device)
        set_seed(run_config.seed)  # as the coordinator does
        try:
            model = make_model(self.task)
        except TaskError:
            if self._told_to_stop:  # the signal handler's SystemExit
                raise SystemExit(DONE) from None
            raise
        try:
            Manifest.unpack(info.manifest).require(Manifest.from_module(model, run_config.aggregation))
        except ManifestMismatch as error:
            raise ManifestMismatch(f"this worker's task does not fit run {info.run!r}: {error}") from None
        check_training(run_config.training, device, model)
        check_example_privacy(run_config.privacy.examples, self.task, model)
        torch.optim.SGD(model.parameters(), lr=0.1)  # the first optimizer imports for a second: now, not in a job
        return model

    def _join(self, candidates: Sequence[Sequence[str]], lease_seconds: float) -> list[str]:
        clients: list[str] = []
        for options in candidates:
            free = [client for client in options if client not in clients]
            client = self._retrying.join(free, lease_seconds)
            if client is None:
                self.store.leave(clients)
                raise ClientTaken(
                    f"client {options[0]} is served by another worker"
                    if len(options) == 1
                    else f"all {len(options)} partitions are served by other workers"
                )
            clients.append(client)
        return clients

    def _load(self, runner: JobRunner, heartbeat: Heartbeat, run_config: Config) -> None:
        """Load the data of each client, then register those that are ready: a job would wait while others load.

        Raises ConfigurationError where the privacy account of a client is damaged.
        """
        registrations = []
        if run_config.example_privacy:
            for name in self.clients:
                runner.account(name)
        for client in map(self.config.clients.client, list(self.clients)):
            try:
                self.policy.check_secure(run_config.secure)
                self.policy.check_noise(run_config.example_privacy)
                data, examples = load_data(self.task, client, run_config.seed)
                if privacy := run_config.example_privacy:
                    runner.require_affordable(client.id, data, run_config.training, privacy)
                self.policy.check_leak(self._on_this_machine(run_config), self.task, client, data)
                told = 0 if run_config.secure.hides_examples else examples
                registration = Registration(client=client.id, examples=told)
            except BaseException as error:
                if self._told_to_stop:  # the signal handler's SystemExit
                    raise
                self._leave_out(client.id, error, heartbeat, run_config.secure.hides_examples)
            else:
                runner.load(client, data)
                registrations.append(registration)
        if not registrations:
            raise LoadFailed(self._failed_loads)
        for registration in registrations:
            self.egress_log.log_registration(registration)
            heartbeat.register(registration)

    def _on_this_machine(self, run_config: Config) -> Config:
        """Return the run's configuration with this machine's device."""
        training = run_config.training.on_machine(self.config.training)
        return run_config.model_copy(update={"training": training})

    def _leave_out(self, client: str, error: BaseException, heartbeat: Heartbeat, examples_hidden: bool) -> None:
        """Report that the client's data cannot be loaded, and serve the others."""
        if isinstance(error, NoExamples):
            log.warning("client left out: it has no examples", client=client)
        else:
            log.error(
                "client left out: the site's policy refuses it"
                if isinstance(error, PolicyRefusal)
                else "client left out: its data cannot be loaded",
                client=client,
                error=exception_text(error),
                exc_info=not isinstance(error, PolicyRefusal | TaskError) and error,
            )
        unavailable = Unavailable(client=client, error=_why_left_out(error, examples_hidden))
        self._failed_loads[client] = _why_left_out(error, examples_hidden=False)
        self.clients.remove(client)
        heartbeat.leave_out(client)
        self.egress_log.log_unavailable(unavailable)
        self._retrying.report_unavailable(unavailable)

    def _serve(self, runner: JobRunner, max_jobs: int | None, burst: bool) -> None:
        """Run RQ's loop, and restart it where an outage in the middle of RQ's bookkeeping ended it."""
        if self._told_to_stop:
            return
        retry, said = RedisRetry(), ""
        with contextlib.suppress(StopRequested):  # raised between two of RQ's loops
            while not runner.told_to_stop:
                interrupted: redis.RedisError = redis.ConnectionError("RQ's loop has ended by itself")
                rq_worker = self._make_rq_worker(runner)
                try:
                    rq_worker.work(
                        burst=burst,
                        logging_level="WARNING",
                        max_jobs=max_jobs - runner.jobs if max_jobs else None,
                        dequeue_strategy=DequeueStrategy.ROUND_ROBIN,
                    )
                    interrupted = rq_worker.interrupted_by or interrupted
                except redis.RedisError as error:
                    interrupted = error
                if runner.told_to_stop:  # nothing more can be reported to a server that is away
                    return
                if max_jobs and runner.jobs >= max_jobs:
                    self.ended_because = self.ended_because or f"max_jobs reached: {max_jobs}"
                    return
                if rq_worker.burst_done:
                    self.ended_because = self.ended_because or "no job is waiting (burst)"
                    return
                why = transient_reason(interrupted)
                if why and why != said:
                    log.warning("RQ's loop was interrupted: restarting it", because=why)
                said = why
                retry.wait(interrupted)

    def _make_rq_worker(self, runner: JobRunner) -> TrainingWorker:
        run, keys = self.store.run, self.store.keys
        name = f"fedqueue-{run}-{uuid.uuid4().hex[:12]}-{client_tag(run, self.clients[0])}"
        return TrainingWorker(runner, self.store.redis, [keys.queue(client) for client in self.clients], name)

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        """Handle a signal before the first job: note it too, as the exception may be lost in a finalizer."""
        if not self._told_to_stop:
            self._told_to_stop = True
            raise SystemExit(DONE)

    def _stop_because(self, reason: str) -> None:
        """Called on the heartbeat's thread: stop as on SIGTERM, which interrupts whatever the main thread waits for."""
        self.ended_because = reason
        main = threading.main_thread().ident
        assert main is not None
        signal.pthread_kill(main, signal.SIGTERM)


def new_token() -> str:
    """A random name, different for each worker process."""
    return uuid.uuid4().hex


def _why_left_out(error: BaseException, examples_hidden: bool) -> str:
    if isinstance(error, NoExamples):
        return NO_EXAMPLES
    if isinstance(error, PolicyRefusal):
        rule = SITE_POLICY if isinstance(error, NoPart | BudgetSpent) else f"{type(error).__name__}: "
        return rule + told_refusal(error, examples_hidden)
    return told_failure(error, NUMBER if examples_hidden else "")
