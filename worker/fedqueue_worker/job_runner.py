"""One training job, from its order to its update: fetch → train → encode → post. Read `train` from top to bottom."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import redis
import structlog
import torch

from fedqueue.config.aggregation import AggregationConfig
from fedqueue.config.client import Client
from fedqueue.config.compression import CompressionConfig
from fedqueue.config.privacy import ExamplePrivacyConfig
from fedqueue.config.schema import Config
from fedqueue.config.training import TrainingConfig
from fedqueue.errors import (
    BudgetSpent,
    JobClosed,
    PolicyRefusal,
    ServerUnavailable,
    SignatureError,
    StoreError,
    WireError,
)
from fedqueue.exception_text import exception_text, exception_with_place
from fedqueue.local_model import LocalModel
from fedqueue.local_update import compute_update
from fedqueue.privacy.secret_random import KEY_BYTES
from fedqueue.privacy.spending import charge_of_job, countable_rows
from fedqueue.protocol.messages import Ending, Order, Update
from fedqueue.protocol.phase import Phase
from fedqueue.protocol.post_result import PostResult
from fedqueue.secure.masked_update import Attempt, Masking
from fedqueue.task import Task
from fedqueue.tensors.blobs import BlobBuffer
from fedqueue.tensors.codec import downlink_codec, uplink_codec
from fedqueue.tensors.error_feedback import ErrorFeedback
from fedqueue.tensors.frame import Frame
from fedqueue.tensors.manifest import Manifest
from fedqueue.tracing import NO_TRACING, Tracing
from fedqueue.transport.connection import refusal
from fedqueue.transport.worker_store import Claim, WorkerStore
from fedqueue.transport.zero_copy import Command
from fedqueue_worker.egress_log import NO_EGRESS_LOG, EgressLog
from fedqueue_worker.heartbeat import Heartbeat
from fedqueue_worker.policy import ALLOW_ALL, Policy
from fedqueue_worker.privacy_account import PrivacyAccount
from fedqueue_worker.retrying_store import RetryingStore
from fedqueue_worker.told_errors import NUMBER, ROWS, told_failure, told_refusal
from fedqueue_worker.worker_metrics import UNOBSERVED, WorkerObserver

log = structlog.get_logger("fedqueue.worker")

UNCOMPRESSED = CompressionConfig()
THIS_MACHINE = TrainingConfig()
MAX_REFUSAL = 500  # characters
KEEPER_POLL_SECONDS = 0.2  # between two looks for a keeper's key
KEYS_SECONDS = 1.0  # that the keepers' keys are used without another look, so that short jobs share one


class HandBack(BaseException):
    """The worker was told to stop, so its job goes back at once. Raised by the signal handler, inside training."""


def no_progress_listener() -> None:
    """No-op, where no caller follows the progress of a job."""


class JobRunner:
    """Trains jobs for the clients of one worker process; model, buffers and data stay in memory between jobs."""

    def __init__(
        self,
        store: WorkerStore,
        task: Task,
        model: torch.nn.Module,
        heartbeat: Heartbeat,
        lease_seconds: float,
        keep_base: bool,
        slowdown: Mapping[str, float],
        policy: Policy = ALLOW_ALL,
        egress_log: EgressLog = NO_EGRESS_LOG,
        compression: CompressionConfig = UNCOMPRESSED,
        aggregation: AggregationConfig | None = None,
        machine: TrainingConfig = THIS_MACHINE,
        measured: Config | None = None,
        masking: Masking | None = None,
        privacy_folder: Path = Path("privacy"),
        tracing: Tracing = NO_TRACING,
        observer: WorkerObserver = UNOBSERVED,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`masking` is that of a run with keepers.

        `compression` and `aggregation` are the run's; the latter decides which buffers are merged how.

        `machine` has the settings of [training] that are this machine's own, such as its device. `measured` is the
        configuration that the policy's `max_leak` was measured with. `privacy_folder` has the clients' accounts.
        `tracing` makes a span for each job and its parts. `observer` is told of the jobs.
        """
        self._measured, self._masking, self._observer = measured, masking, observer
        self._hides_examples = masking is not None and masking.hides_examples
        self._known_keys: list[bytes] = []  # of the keepers, once each has stored one
        self._keys_until = -math.inf  # until when they are used without another look
        self._clock = clock
        self._store, self._task, self._heartbeat, self._machine = store, task, heartbeat, machine
        self._retrying = RetryingStore(store, lambda: self.told_to_stop)
        self._lease_seconds, self._keep_base, self._slowdown = lease_seconds, keep_base, slowdown
        manifest = Manifest.from_module(model, aggregation)
        self._model = LocalModel(task, model, manifest)
        self._base = Frame(manifest, np.empty(manifest.nbytes, np.uint8))
        self._local = Frame(manifest, np.empty(manifest.nbytes, np.uint8))
        self._downlink = downlink_codec(compression, manifest)
        self._feedback = ErrorFeedback(uplink_codec(compression, manifest))
        self._clients: dict[str, tuple[Client, Any]] = {}
        self._last_failure: dict[str, str] = {}  # client → why its last job ended without an update
        self._failed: Counter[str] = Counter()  # client → its jobs that failed or were refused
        self._accepted: set[str] = set()  # clients with an accepted update
        self._logged: set[str] = set()  # failures whose traceback is in the log
        self._policy, self._egress_log = policy, egress_log
        self._privacy_folder, self._tracing = privacy_folder, tracing
        self._accounts: dict[str, PrivacyAccount] = {}
        self._privacy: ExamplePrivacyConfig | None = None  # of the last order that protects rows
        self.jobs = 0
        """The number of attempts that have ended, however they ended."""
        self.told_to_stop = False
        self.interruptible = False
        """Whether `stop` raises HandBack: only while a job is in training."""

    def load(self, client: Client, data: Any) -> None:
        """Serve this client with this data from now on."""
        self._clients[client.id] = client, data
        if self._feedback.holds_back:
            log.info("error feedback begins at zero", client=client.id)

    def stop(self) -> None:
        """Begin no further attempt; raises HandBack where one is in training. Called by a signal handler."""
        self.told_to_stop = True
        if self.interruptible:
            self.interruptible = False
            raise HandBack

    def train(
        self,
        order: bytes | dict[str, Any],
        on_progress: Callable[[], None] = no_progress_listener,
        commands_for_post: Callable[[], list[Command]] = list,
    ) -> bool:
        """Carry out an order (signed: bytes, unsigned: a map), and report how its job ended.

        `on_progress` is called after each piece of a transfer, after each batch and after encoding; it may raise
        RedisError.
        `commands_for_post` is called once, before the post of the update: its commands are sent behind the post.
        Returns whether commands of `commands_for_post` were sent.

        Raises WireError where the order is malformed, not signed by the run's coordinator, or not for a client here.
        """
        wanted = self._retrying.open_order(order)
        if wanted.run != self._store.run or wanted.client not in self._clients:
            raise WireError(f"order for client {wanted.client} of run {wanted.run}: not served here")
        with (
            structlog.contextvars.bound_contextvars(job=wanted.job, client=wanted.client),
            self._tracing.span("job", wanted.traceparent, "consumer", job=wanted.job, client=wanted.client) as span,
        ):
            return self._carry_out(wanted, span or wanted.traceparent, on_progress, commands_for_post)

    def _carry_out(
        self,
        wanted: Order,
        traceparent: str,
        on_progress: Callable[[], None],
        commands_for_post: Callable[[], list[Command]],
    ) -> bool:
        """Claim a job and report how it ended; as `train`."""
        try:
            with self._tracing.span("claim"):
                claim = self._retrying.claim(wanted.job, self._lease_seconds, wanted.client)
        except (JobClosed, ServerUnavailable, SignatureError) as error:
            log.warning("job not begun", job=wanted.job, reason=str(error))
            self._observer.ended(wanted.client, "not_begun")
            return False
        self._heartbeat.begin(claim)
        self._observer.entered(Phase.FETCHING)
        try:
            with self._interruptible():
                return self._attempt(wanted, claim, traceparent, on_progress, commands_for_post)
        except (PolicyRefusal, SignatureError) as error:
            final = isinstance(error, BudgetSpent)
            log.warning(
                "job refused, and with it every further one of this client: its privacy budget is used up"
                if final
                else "job refused; compare it with this site's policy and keys",
                job=wanted.job,
                client=wanted.client,
                reason=str(error),
            )
            text = told_refusal(error, self._hides_examples)[:MAX_REFUSAL]
            self._observer.ended(wanted.client, "refused")
            self._end(claim, wanted.client, Ending(reason="refused", error=text, final=final))
        except (JobClosed, StoreError) as error:  # a version that is gone belongs to a job that is gone
            log.warning("job dropped: it was closed during training", job=wanted.job, reason=str(error))
            self._observer.ended(wanted.client, "closed")
        except HandBack:
            self._observer.ended(wanted.client, "handed_back")
            self._hand_back(claim)
        except BaseException as error:  # Ctrl-C raises HandBack: whatever else comes here, the task's code raised it
            self._log_failure(wanted, error)
            kept = ROWS if wanted.privacy else NUMBER if self._hides_examples else ""
            self._observer.ended(wanted.client, "failed")
            self._end(claim, wanted.client, Ending(reason="failed", error=told_failure(error, kept)))
        finally:
            self._heartbeat.finish()
            self._observer.entered(None)
            self.jobs += 1
        return False

    def _attempt(
        self,
        order: Order,
        claim: Claim,
        traceparent: str,
        on_progress: Callable[[], None],
        commands_for_post: Callable[[], list[Command]],
    ) -> bool:
        """Train and post; returns whether commands were sent behind the post."""

        def made_progress() -> None:
            self._heartbeat.progress()
            with contextlib.suppress(redis.RedisError):  # RQ's tools then show less, which costs no update
                on_progress()

        client, data = self._clients[order.client]
        if self._measured:
            self._policy.check_settings(order, self._measured)
        order = order.model_copy(update={"training": order.training.on_machine(self._machine)})
        self._policy.check_job(order.training, self._task.num_examples(data), order.privacy)
        if order.privacy:
            self.require_affordable(client.id, data, order.training, order.privacy)
        heartbeat = self._heartbeat

        def received_piece() -> None:
            heartbeat.after_piece()
            made_progress()

        with self._tracing.span("fetch", version=claim.version):
            model = self._fetch(claim, order.client, received_piece)
        if not self._keep_base:
            self._retrying.release_base(claim)
        self._enter(Phase.TRAINING)
        made_progress()
        if self._masking and not self._known_keys:
            self._keeper_keys(self._masking)  # before the training: the work would be lost with its attempt

        def trained_batch() -> None:
            self._policy.check_batches(progress.batches)
            made_progress()

        report = slowed(trained_batch, self._slowdown.get(client.id, 1.0))
        progress = self._model.progress(client, claim.version, report)
        noise_key = self._pay(order, data) if order.privacy else b""
        with self._tracing.span("train"):
            update = compute_update(self._task, self._model, data, order, self._base, self._local, progress, noise_key)
        update = self._policy.without_withheld_metrics(update)
        if traceparent:
            update = update.model_copy(update={"traceparent": traceparent})
        with self._tracing.span("encode"):
            update, payload = self._encode(order, claim, update, model)
        self._egress_log.log_update(claim, update, payload)
        made_progress()
        commands = commands_for_post()
        self._post(order, claim, update, payload, commands, made_progress)
        return bool(commands)

    def _post(
        self,
        order: Order,
        claim: Claim,
        update: Update,
        payload: BlobBuffer,
        commands: list[Command],
        made_progress: Callable[[], None],
    ) -> None:
        """Post the update, with `commands` behind it."""
        heartbeat = self._heartbeat
        self._observer.trained(order.client, update.seconds)
        self._enter(Phase.SENDING)
        with self._tracing.span("post", bytes=update.nbytes):
            result = self._retrying.post(
                claim, update, payload, commands, heartbeat.job_lease_seconds, heartbeat.progress, made_progress
            )
        accepted = result in (PostResult.ACCEPTED, PostResult.REPLAYED)
        self._observer.posted(order.client, payload.nbytes, accepted)
        # Replayed: an earlier try was stored, and its answer was lost.
        if accepted:
            self._feedback.accepted(order.client, self._local)
            self._accepted.add(order.client)
        if result is not PostResult.ACCEPTED:
            self._egress_log.log_refused_post(claim, result)
            log.warning(
                "update refused: its job has ended or belongs to another attempt", job=order.job, reason=result.value
            )
        else:
            log.debug("update posted", job=order.job, base=claim.version, seconds=round(update.seconds, 3))

    def _fetch(self, claim: Claim, client: str, received_piece: Callable[[], None]) -> str:
        """Download the base version, and once the frozen tensors; returns the version's digest."""
        before = self._retrying.received_bytes
        if self._base.frozen is None and (nbytes := self._base.manifest.frozen_nbytes):
            self._base.frozen = self._retrying.fetch_frozen(nbytes, self._heartbeat.progress, received_piece)
        model = self._retrying.fetch_model(
            claim.version, self._downlink, self._base, self._heartbeat.progress, received_piece
        )
        self._observer.received(client, self._retrying.received_bytes - before)
        return model

    def _enter(self, phase: Phase) -> None:
        self._heartbeat.enter(phase)
        self._observer.entered(phase)

    def _encode(self, order: Order, claim: Claim, update: Update, model: str) -> tuple[Update, BlobBuffer]:
        """The header and the payload to post; `model` is the digest of the base version."""
        if self._masking is None:
            update, payload = self._feedback.encode(order.client, self._local, update, order.seed)
            return self._store.described(update, payload), payload
        assert self._store.identity, "a run with keepers is signed"
        attempt = Attempt(self._store.identity.scope, claim.attempt, claim.version, model)
        return self._masking.mask(update, self._local, order, attempt, self._keeper_keys(self._masking))

    def _keeper_keys(self, masking: Masking) -> list[bytes]:
        """The keepers' public encryption keys; waits for a keeper that has stored none.

        Raises JobClosed once the job is no longer this attempt's, and SignatureError as `WorkerStore.keeper_keys`.
        """
        if self._clock() < self._keys_until:
            return self._known_keys
        waiting: set[str] = set()
        while True:
            keys = self._retrying.keeper_keys(masking.keepers)
            known = [key for key in keys if key is not None]
            if len(known) == len(keys):
                self._known_keys, self._keys_until = known, self._clock() + KEYS_SECONDS
                return known
            for keeper, key in zip(masking.keepers, keys, strict=True):
                if key is None and keeper not in waiting:
                    log.warning("waiting for a keeper's key: its operator must start it", keeper=keeper)
                    waiting.add(keeper)
            self._heartbeat.progress()
            time.sleep(KEEPER_POLL_SECONDS)

    def account(self, client: str) -> PrivacyAccount:
        """Return the client's privacy account, which is opened at its first use; raises as PrivacyAccount."""
        if client not in self._accounts:
            self._accounts[client] = PrivacyAccount(self._privacy_folder, client, self._policy)
        return self._accounts[client]

    def require_affordable(
        self, client: str, data: Any, training: TrainingConfig, privacy: ExamplePrivacyConfig
    ) -> None:
        """Raises BudgetSpent where a job of the client with these settings would exceed a privacy budget."""
        charge = charge_of_job(privacy, training, countable_rows(data))
        self.account(client).require_affordable(self._store.run, charge, privacy)
        self._privacy = privacy

    def _pay(self, order: Order, data: Any) -> bytes:
        """Charge the client for a job, and return the key of its noise, which is kept nowhere and never used again."""
        assert order.privacy is not None
        charge = charge_of_job(order.privacy, order.training, countable_rows(data))
        self.account(order.client).charge(order.run, charge, order.privacy)
        return os.urandom(KEY_BYTES)

    def privacy_spent(self) -> list[str]:
        """Return a line for each client whose rows are protected: how much of its budget is spent."""
        run, privacy = self._store.run, self._privacy
        return [account.summary(run, privacy) for account in self._accounts.values()] if privacy else []

    def without_update(self) -> dict[str, str]:
        """Client → why no update of it was accepted, for each such client that was loaded."""
        reasons = {}
        for client in self._clients:
            if client not in self._accepted:
                reason = self._last_failure.get(client, "no job of it came to an end")
                times = f" ({self._failed[client]} jobs)" if self._failed[client] > 1 else ""
                reasons[client] = reason + times
        return reasons

    def _log_failure(self, order: Order, error: BaseException) -> None:
        """Log a failure of the task's code; the traceback comes with the first of each kind."""
        text = exception_with_place(error)
        first = text not in self._logged
        self._logged.add(text)
        log.error(
            "training failed",
            job=order.job,
            client=order.client,
            error=exception_text(error) if first else text,
            exc_info=first and error,
        )

    def _end(self, claim: Claim, client: str, ending: Ending) -> None:
        self._last_failure[client] = f"{ending.reason}: {ending.error}"
        self._failed[client] += 1
        self._egress_log.log_ending(claim, ending)
        try:
            self._retrying.end(claim, ending)
        except ServerUnavailable as error:
            if not self.told_to_stop:
                raise
            log.warning("end of the job not reported: its lease has to expire", job=claim.job, reason=str(error))

    def _hand_back(self, claim: Claim) -> None:
        ending = Ending(reason="returned")
        try:
            self._egress_log.log_ending(claim, ending)
            result = self._store.end(claim, ending)
        except redis.RedisError as error:  # there is no time to wait: the lease expires instead
            log.warning("job not handed back: its lease has to expire", job=claim.job, reason=refusal(error))
        else:
            log.info("job handed back", job=claim.job, refused=result.value or None)

    @contextlib.contextmanager
    def _interruptible(self) -> Iterator[None]:
        self.interruptible = True
        try:
            if self.told_to_stop:  # while the job was claimed
                raise HandBack
            yield
        finally:
            self.interruptible = False


def slowed(progress: Callable[[], None], factor: float) -> Callable[[], None]:
    """A `progress` that sleeps before each call, so that training takes `factor` times as long: a slow site."""
    if factor <= 1.0:
        return progress
    return _slow(progress, factor, time.perf_counter, time.sleep)


def _slow(
    progress: Callable[[], None], factor: float, clock: Callable[[], float], sleep: Callable[[float], None]
) -> Callable[[], None]:
    last = clock()

    def slow_progress() -> None:
        nonlocal last
        sleep((clock() - last) * (factor - 1))
        last = clock()
        progress()

    return slow_progress
