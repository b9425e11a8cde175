"""The worker's sign of life: a thread that keeps its clients alive and renews the lease of its job.

The lease is renewed only while training makes progress, so a hung loader or device loses its job as a dead process
does. What the coordinator decided meanwhile comes back with the same beat.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

import redis
import structlog

from fedqueue.errors import ClientTaken, JobClosed, SignatureError
from fedqueue.protocol.messages import Registration
from fedqueue.transport.worker_store import Claim, WorkerStore

log = structlog.get_logger("fedqueue.worker")


class Heartbeat:
    """Beats every third of the lease. `on_end` is called on its thread, once, when the worker has to go."""

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
        self._signed_with: dict[str, str] = {}  # client → the key under which its registration was said
        self._current: Claim | None = None
        self._last_progress = 0.0
        self._lost = False
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._done.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()

    def register(self, registration: Registration) -> None:
        """Say that the client is ready; said again should the coordinator have given it up for lost."""
        self._registrations[registration.client] = registration
        self._signed_with[registration.client] = self._store.key_of(registration.client)
        if not self._store.register(registration):
            raise ClientTaken(f"client {registration.client} is served by another worker by now")

    # The job

    def begin(self, claim: Claim) -> None:
        self._last_progress, self._lost = self._clock(), False
        self._current = claim  # last: the other thread looks at it first

    def progress(self) -> None:
        """Training goes forward; raises JobClosed where the job is no longer this attempt's."""
        self._last_progress = self._clock()
        if self._lost:
            raise JobClosed("the lease of the job is over")

    def finish(self) -> None:
        self._current = None

    # The beat

    def beat(self) -> None:
        """One sign of life; what comes back is acted upon at once."""
        current = self._current
        progressing = self._clock() - self._last_progress < self._stall_seconds
        pulse = self._store.heartbeat(self._clients, self._lease_seconds, current, progressing)
        if current and current is self._current and not pulse.holds_job:
            self._lost = True
        if current and not progressing:
            log.warning("training makes no progress: its lease runs out", job=current.job)
        if pulse.run_state == "ended":
            self._end("the run has ended")
            return
        if not pulse.run_state:  # Redis has lost everything; a coordinator will bring the run back from its disk
            log.warning("the run is not in Redis: waiting for its coordinator")
            return
        for client in pulse.lost_clients:
            self._rejoin(client)
        for client, key in list(self._signed_with.items()):
            if self._store.key_of(client) != key:
                log.info("this client has a new key: registered again", client=client)
                self._say_again(client)

    def _rejoin(self, client: str) -> None:
        """The coordinator gave the client up (a long pause, a lost network): serve it again, if nobody else does."""
        if self._store.join([client], self._lease_seconds) is None:
            self._end(f"client {client} is served by another worker by now")
        elif client in self._registrations:
            log.warning("the coordinator had given this client up: registered again", client=client)
            self._say_again(client)

    def _say_again(self, client: str) -> None:
        self._signed_with[client] = self._store.key_of(client)
        try:
            self._store.register(self._registrations[client])
        except SignatureError as error:
            self._end(f"the run is not to be trusted: {error}")

    def _end(self, because: str) -> None:
        if not self._done.is_set():
            self._done.set()
            self._on_end(because)

    def _run(self) -> None:
        while not self._done.wait(self._lease_seconds / 3):
            try:
                self.beat()
            except redis.RedisError as error:
                log.warning("heartbeat failed", error=str(error))
