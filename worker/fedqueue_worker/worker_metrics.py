"""Counts what a worker process does, for Prometheus. Each method is called where the thing happens."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from fedqueue.observability import catalogue
from fedqueue.observability.endpoint import make
from fedqueue.protocol.phase import Phase

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

IDLE = "idle"


class WorkerObserver:
    """Is told of the jobs of a worker process, on the thread that trains. This one does nothing."""

    def entered(self, phase: Phase | None) -> None:
        """An attempt is in this phase from now on; None: no attempt is under way."""

    def received(self, client: str, nbytes: int) -> None:
        """A version was downloaded, for a job of this client."""

    def trained(self, client: str, seconds: float) -> None:
        """A training took that long."""

    def posted(self, client: str, nbytes: int, accepted: bool) -> None:
        """An update of `nbytes` bytes was uploaded; Redis refuses it if its job has ended meanwhile."""

    def ended(self, client: str, how: str) -> None:
        """An attempt ended without a post: failed, refused, closed, handed_back or not_begun."""


UNOBSERVED = WorkerObserver()


class WorkerMetrics(WorkerObserver):
    """The metrics of `catalogue.WORKER`, with a label for each client of this worker."""

    def __init__(self, registry: CollectorRegistry, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._jobs = make(catalogue.WORKER_JOBS, registry)
        self._training = make(catalogue.WORKER_TRAINING, registry)
        self._received = make(catalogue.WORKER_RECEIVED, registry)
        self._sent = make(catalogue.WORKER_SENT, registry)
        self._last = make(catalogue.WORKER_LAST_UPDATE, registry)
        phase = make(catalogue.WORKER_PHASE, registry)
        self._phases = {name: phase.labels(name) for name in (IDLE, *map(str, Phase))}
        self._phase = ""
        self.entered(None)

    def entered(self, phase: Phase | None) -> None:
        """Show the phase."""
        before, self._phase = self._phase, IDLE if phase is None else str(phase)
        if before != self._phase:
            if before:
                self._phases[before].set(0)
            self._phases[self._phase].set(1)

    def received(self, client: str, nbytes: int) -> None:
        """Count the bytes of a download."""
        self._received.labels(client).inc(nbytes)

    def trained(self, client: str, seconds: float) -> None:
        """Count a training."""
        self._training.labels(client).observe(seconds)

    def posted(self, client: str, nbytes: int, accepted: bool) -> None:
        """Count an upload."""
        self._sent.labels(client).inc(nbytes)
        self._jobs.labels(client, "posted" if accepted else "late").inc()
        if accepted:
            self._last.labels(client).set(self._clock())

    def ended(self, client: str, how: str) -> None:
        """Count an attempt."""
        self._jobs.labels(client, how).inc()
