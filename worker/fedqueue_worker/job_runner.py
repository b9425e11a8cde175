"""One training job, from its order to its update: fetch → train → encode → post. Read `train` from top to bottom."""

from __future__ import annotations

import contextlib
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import redis
import structlog
import torch

from fedqueue.config.compression import CompressionConfig
from fedqueue.errors import JobClosed, PolicyRefusal, ServerUnavailable, SignatureError, StoreError, WireError
from fedqueue.local_update import compute_update
from fedqueue.protocol.messages import Ending, Order
from fedqueue.task import Progress, Task
from fedqueue.tensors.codec import downward, upward
from fedqueue.tensors.error_feedback import ErrorFeedback
from fedqueue.tensors.frame import Frame, Manifest
from fedqueue.transport.retry import RedisRetry
from fedqueue.transport.worker_store import Claim, WorkerStore
from fedqueue.transport.zero_copy import Command
from fedqueue_worker.egress_log import SILENT, EgressLog
from fedqueue_worker.heartbeat import Heartbeat
from fedqueue_worker.policy import ANYTHING, Policy

log = structlog.get_logger("fedqueue.worker")

UNCOMPRESSED = CompressionConfig()
ERROR_FRAMES = 3
ERROR_MESSAGE = 500  # characters


class HandBack(BaseException):
    """The worker was told to stop: the job goes back at once. Raised by the signal handler, inside training."""


class JobRunner:
    """Trains jobs for the clients of one worker process; model, buffers and data stay warm between them."""

    def __init__(
        self,
        store: WorkerStore,
        task: Task,
        model: torch.nn.Module,
        heartbeat: Heartbeat,
        lease_seconds: float,
        keep_base: bool,
        slowdown: Mapping[str, float],
        policy: Policy = ANYTHING,
        egress_log: EgressLog = SILENT,
        compression: CompressionConfig = UNCOMPRESSED,
    ) -> None:
        self._store, self._task, self._model, self._heartbeat = store, task, model, heartbeat
        self._lease_seconds, self._keep_base, self._slowdown = lease_seconds, keep_base, slowdown
        manifest = Manifest.from_module(model)
        self._base = Frame(manifest, np.empty(manifest.nbytes, np.uint8))
        self._local = Frame(manifest, np.empty(manifest.nbytes, np.uint8))
        self._down, self._feedback = downward(compression, manifest), ErrorFeedback(upward(compression, manifest))
        self._data: dict[str, Any] = {}
        self._policy, self._egress_log = policy, egress_log
        self._retry = RedisRetry(lambda: self.told_to_stop)
        self.on_progress: Callable[[], None] = lambda: None
        self.closing: Callable[[], list[Command]] = list
        """The commands with which RQ's record of the job ends, if they may travel with the job's post."""
        self.closed = False
        """Whether they have: of the last job."""
        self.jobs = 0
        self.told_to_stop = False
        self.interruptible = False
        """Whether a signal handler may raise HandBack now."""

    def load(self, client: str, data: Any) -> None:
        self._data[client] = data
        if self._feedback.holds_back:
            log.info("error feedback begins at zero", client=client)

    def train(self, order: bytes | dict[str, Any]) -> None:
        """Run the order (sealed, or as a map) to its end; whatever happens to its job is reported, nothing is raised.

        Raises WireError for what is no order of the run's coordinator.
        """
        self.closed = False
        wanted = self._retry.call(lambda: self._store.open_order(order))
        if wanted.run != self._store.run or wanted.client not in self._data:
            raise WireError(f"order for client {wanted.client} of run {wanted.run}: not served here")
        try:
            claim = self._retry.call(lambda: self._store.claim(wanted.job, self._lease_seconds, wanted.client))
        except (JobClosed, ServerUnavailable, SignatureError) as error:
            log.warning("job not begun", job=wanted.job, reason=str(error))
            return
        self._heartbeat.begin(claim)
        try:
            with self._interruptible():
                self._attempt(wanted, claim)
        except (PolicyRefusal, SignatureError) as error:
            log.warning("job refused", job=wanted.job, client=wanted.client, reason=str(error))
            self._end(claim, Ending(reason="refused", error=str(error)[:ERROR_MESSAGE]))
        except (JobClosed, StoreError) as error:  # a version that is gone belongs to a job that is gone
            log.warning("work dropped", job=wanted.job, reason=str(error))
        except HandBack:
            self._hand_back(claim)
        except Exception as error:
            log.exception("training failed", job=wanted.job, client=wanted.client)
            self._end(claim, Ending(reason="failed", error=describe(error)))
        finally:
            self._heartbeat.finish()
            self.jobs += 1

    def _end(self, claim: Claim, ending: Ending) -> None:
        self._egress_log.ends(claim, ending)
        self._retry.call(lambda: self._store.end(claim, ending))

    def _attempt(self, order: Order, claim: Claim) -> None:
        self._policy.agree_to(order.training, self._task.num_examples(self._data[order.client]))
        self._retry.call(lambda: self._store.fetch_model(claim.version, self._down, self._base))
        if not self._keep_base:
            self._retry.call(lambda: self._store.release_base(claim))
        self._progress()

        progress = slowed(self._progress, self._slowdown.get(order.client, 1.0))
        update = compute_update(
            self._task, self._model, self._data[order.client], order, self._base, self._local, progress
        )
        update = self._policy.let_out(update)
        update, wire = self._feedback.encode(order.client, self._local, update, order.seed)
        update = self._store.described(update, wire)
        self._egress_log.posts(claim, update, wire)
        self._progress()
        closing = self.closing()
        refused = self._retry.call(lambda: self._store.post(claim, update, wire, closing))
        self.closed = bool(closing)
        if refused in ("", "replayed"):  # replayed: it was taken, and the answer was lost
            self._feedback.accepted(order.client, self._local)
        if refused:
            self._egress_log.was_refused(claim, refused)
            log.warning("update refused", job=order.job, reason=refused)
        else:
            log.debug("update posted", job=order.job, base=claim.version, seconds=round(update.seconds, 3))

    def _progress(self) -> None:
        self._heartbeat.progress()
        with contextlib.suppress(redis.RedisError):  # whoever looks at RQ sees less: no reason to drop the work
            self.on_progress()

    def _hand_back(self, claim: Claim) -> None:
        ending = Ending(reason="returned")
        try:
            self._egress_log.ends(claim, ending)
            refused = self._store.end(claim, ending)
        except redis.RedisError as error:  # no time to wait: its lease will run out
            log.warning("job not handed back", job=claim.job, reason=str(error))
        else:
            log.info("job handed back", job=claim.job, refused=refused or None)

    @contextlib.contextmanager
    def _interruptible(self) -> Iterator[None]:
        self.interruptible = True
        try:
            if self.told_to_stop:  # while the job was claimed
                raise HandBack
            yield
        finally:
            self.interruptible = False


def slowed(progress: Progress, factor: float) -> Progress:
    """`progress`, after sleeping so long that what came before took `factor` times as long: emulates a slow site."""
    if factor <= 1.0:
        return progress
    return _slow(progress, factor, time.perf_counter, time.sleep)


def _slow(progress: Progress, factor: float, clock: Callable[[], float], sleep: Callable[[float], None]) -> Progress:
    last = clock()

    def slow_progress() -> None:
        nonlocal last
        sleep((clock() - last) * (factor - 1))
        last = clock()
        progress()

    return slow_progress


def describe(error: Exception) -> str:
    """Type, message and last frames of a task's exception: where it was raised, without any variable."""
    frames = traceback.extract_tb(error.__traceback__)[-ERROR_FRAMES:]
    where = " < ".join(f"{frame.name} ({frame.filename.rpartition('/')[2]}:{frame.lineno})" for frame in frames[::-1])
    return f"{type(error).__name__}: {str(error)[:ERROR_MESSAGE]}; in {where}"
