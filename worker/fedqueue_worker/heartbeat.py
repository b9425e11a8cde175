"""The worker's heartbeat: a thread that keeps its clients alive and renews the lease of its running job.

The lease is renewed only while the job makes progress, so a worker with a hung loader or device loses its job as a
dead one does. Bytes of a transfer are progress. In a long transfer the lease is `stall_seconds` long, because a break
of the line stops the heartbeats, too. The reply to a heartbeat tells the worker of a lost job, an expired client, or
the end of the run.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Sequence

import redis
import structlog

from fedqueue.errors import ClientTaken, JobClosed, RunNotFound, SignatureError
from fedqueue.protocol.messages import Registration
from fedqueue.protocol.phase import Phase
from fedqueue.transport.connection import eviction_note, refusal
from fedqueue.transport.retry import transient_reason
from fedqueue.transport.worker_store import Claim, WorkerStore

log = structlog.get_logger("fedqueue.worker")

LONG_TRANSFER_SECONDS = 1.0
"""A transfer that takes longer is a long one. The lease of a worker that dies in it ends after `stall_seconds`."""
STALLED = {
    Phase.FETCHING: "download moves no bytes: the job's lease is not renewed; check the line to Redis",
    Phase.TRAINING: "training makes no progress: the job's lease is not renewed; check data loader and device",
    Phase.SENDING: "upload moves no bytes: the job's lease is not renewed; check the line to Redis",
}


class Heartbeat:
    """Beats every third of the lease. Calls `on_end` once, on its own thread, when the worker has to stop."""

    def __init__(
        self,
        store: WorkerStore,
        clients: Sequence[str],
        lease_seconds: float,
        stall_seconds: float,
        on_end: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store, self._clients, self._on_end, self._clock = store, list(clients), on_end, clock
        self._lease_seconds, self._stall_seconds = lease_seconds, stall_seconds
        self._registrations: dict[str, Registration] = {}
        # client → id of the key that signed its registration; None until a repeated registration has succeeded
        self._signed_with: dict[str, str | None] = {}
        self._current: Claim | None = None
        self._phase, self._phase_began = Phase.FETCHING, 0.0
        self._last_progress = 0.0
        self._last_renewal = 0.0
        self._lost = False
        self._missing = False  # the run, at the last beat
        self._said = ""  # why the last beat failed
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Stop the thread, and wait for its last heartbeat unless this is that thread."""
        self._done.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()

    def leave_out(self, client: str) -> None:
        """Keep the client alive no longer; call this before its lease is released."""
        self._clients = [other for other in self._clients if other != client]

    def register(self, registration: Registration) -> None:
        """Register the client; repeated if the coordinator expires it. Raises ClientTaken."""
        self._registrations[registration.client] = registration
        self._signed_with[registration.client] = self._store.key_of(registration.client)
        if not self._store.register(registration):
            raise ClientTaken(f"another worker now serves client {registration.client}")

    # The job

    def begin(self, claim: Claim) -> None:
        """Renew the lease of this job from now on."""
        self.enter(Phase.FETCHING)
        self._last_renewal, self._lost = self._clock(), False
        self._current = claim  # last: the other thread looks at it first

    def enter(self, phase: Phase) -> None:
        """Note the phase that the attempt is in from now on; that is progress."""
        self._phase, self._phase_began = phase, self._clock()
        self._last_progress = self._phase_began

    def progress(self) -> None:
        """Note that a batch was finished or bytes moved; raises JobClosed where the job is not this attempt's."""
        self._last_progress = self._clock()
        if self._lost:
            raise JobClosed("the job's lease has expired")

    def after_piece(self) -> None:
        """Renew the lease after a piece of a transfer, if a break of the line has made the other thread late with it.

        Raises JobClosed as `progress`.
        """
        self.progress()
        if self._clock() - self._last_renewal < self._lease_seconds / 3:
            return
        job_lease = self.job_lease_seconds()
        with contextlib.suppress(redis.RedisError):  # the next piece, or the other thread, tries again
            reply = self._store.heartbeat([], self._lease_seconds, self._current, True, self._phase, job_lease)
            self._last_renewal = self._clock()
            self._lost = self._lost or not reply.owns_job
        self.progress()

    def job_lease_seconds(self) -> float:
        """The length of the job's lease: in a long transfer, what is left of `stall_seconds` without a byte."""
        now = self._clock()
        if self._phase is Phase.TRAINING or now - self._phase_began < LONG_TRANSFER_SECONDS:
            return self._lease_seconds
        return max(self._lease_seconds, self._stall_seconds - (now - self._last_progress))

    def finish(self) -> None:
        """Renew no lease until the next `begin`."""
        self._current = None

    # The beat

    def beat(self) -> None:
        """Send one heartbeat and act on its reply."""
        current = self._current
        phase, progressing = self._phase, self._clock() - self._last_progress < self._stall_seconds
        reply = self._store.heartbeat(
            self._clients, self._lease_seconds, current, progressing, phase, self.job_lease_seconds()
        )
        self._last_renewal = self._clock()
        if current and current is self._current and not reply.owns_job:
            self._lost = True
        if current and not progressing:
            log.warning(STALLED[phase], job=current.job)
        if reply.run_state == "ended":
            self._end("the run has ended")
            return
        if not reply.run_state:  # Redis has lost its data; the coordinator restores the run from its checkpoint
            if not self._missing:
                why = eviction_note(self._store.redis)
                log.warning(
                    "run missing from Redis: waiting for its coordinator to restore it",
                    **({"because": why} if why else {}),
                )
            self._missing = True
            return
        self._missing = False
        for client in reply.lost_clients:
            if client in self._clients:
                self._rejoin(client)
        for client, key in list(self._signed_with.items()):
            if self._store.key_of(client) != key:
                why = "its last registration failed" if key is None else "it has a new key"
                log.info("registering the client again", client=client, because=why)
                self._register_again(client)

    def _rejoin(self, client: str) -> None:
        """Serve a client again that the coordinator expired after a pause, unless another worker serves it by now."""
        if self._store.join([client], self._lease_seconds) is None:
            self._end(f"another worker now serves client {client}")
        elif client in self._registrations:
            log.warning("the coordinator expired this client: registering it again", client=client)
            self._register_again(client)

    def _register_again(self, client: str) -> None:
        # Cleared first: if Redis fails here, the client is held, so no later reply names it as lost.
        key, self._signed_with[client] = self._store.key_of(client), None
        try:
            self._store.register(self._registrations[client])
        except SignatureError as error:
            self._end(f"the run cannot be verified: {error}")
        else:
            self._signed_with[client] = key

    def _end(self, reason: str) -> None:
        if not self._done.is_set():
            self._done.set()
            self._on_end(reason)

    def _run(self) -> None:
        while not self._done.wait(self._lease_seconds / 3):
            self.beat_or_warn()

    def beat_or_warn(self) -> None:
        """Send one heartbeat; an error of Redis becomes a warning, once for each reason until a heartbeat succeeds."""
        try:
            self.beat()
        except (redis.RedisError, RunNotFound) as error:  # RunNotFound: the data were lost after the beat's reply
            why = transient_reason(error) or refusal(error) if isinstance(error, redis.RedisError) else str(error)
            if why != self._said and not self._done.is_set():
                log.warning("heartbeat failed: trying again", because=why)
            self._said = why
        else:
            self._said = ""
