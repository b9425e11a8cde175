"""Counts what a coordinator does, for Prometheus. Each method is called where the thing happens."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from fedqueue.config.schema import Config
from fedqueue.observability import catalogue
from fedqueue.observability.endpoint import make
from fedqueue_coordinator.core.observer import RunObserver

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from fedqueue_coordinator.core.federation import Federation

MOST_CLIENTS = 100
"""Clients of a run that have a label of their own; with more of them, all are counted together."""
OTHER = "(other)"
SAMPLE_SECONDS = 0.2  # between two looks at the federation


class RunMetrics(RunObserver):
    """The metrics of `catalogue.COORDINATOR`."""

    def __init__(
        self, config: Config, registry: CollectorRegistry, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        ids = config.clients.ids
        self._named = frozenset(ids if len(ids) <= MOST_CLIENTS else ())
        self._keepers = config.secure.keepers
        self._made_at = clock()  # the newest version
        self._next = 0.0  # look at the federation, on `clock`
        self._looked_at_clients: frozenset[str] | None = None
        of = {metric.name: make(metric, registry) for metric in catalogue.COORDINATOR}
        of[catalogue.RUN_INFO.name].labels(config.name, config.aggregation.strategy).set(1)
        of[catalogue.CLIENTS_EXPECTED.name].set(config.clients.number)
        of[catalogue.SECONDS_SINCE_VERSION.name].set_function(lambda: self._clock() - self._made_at)
        self._version = of[catalogue.VERSION.name]
        self._merged = of[catalogue.UPDATES_MERGED.name]
        self._rejected, self._abandoned = of[catalogue.REJECTED.name], of[catalogue.ABANDONED.name]
        self._dispatched, self._bytes = of[catalogue.DISPATCHED.name], of[catalogue.UPDATE_BYTES.name]
        self._staleness, self._norm = of[catalogue.STALENESS.name], of[catalogue.UPDATE_NORM.name]
        self._training_seconds = of[catalogue.TRAINING_SECONDS.name]
        self._open, self._buffered = of[catalogue.JOBS_OPEN.name], of[catalogue.BUFFERED.name]
        self._clients, self._client = of[catalogue.CLIENTS_ALIVE.name], of[catalogue.CLIENT_ALIVE.name]
        self._awaited = of[catalogue.KEEPER_AWAITED.name]
        self._evaluation, self._failed = of[catalogue.EVALUATION.name], of[catalogue.EVALUATIONS_FAILED.name]
        self._outages = of[catalogue.REDIS_OUTAGES.name]
        self._used, self._limit = of[catalogue.REDIS_USED.name], of[catalogue.REDIS_LIMIT.name]

    def begins(self, federation: Federation, now: float) -> None:
        """Show the version that the run begins or continues with."""
        self._version.set(federation.version)
        self._made_at, self._next = self._clock(), 0.0
        self.progressed(federation, now)

    def recorded(self, record: Mapping[str, Any]) -> None:
        """Count what a record of the ledger tells, once it is committed."""
        match record["kind"]:
            case "version":
                self._version.set(record["version"])
                self._made_at = self._clock()
                for update in record["merged"]:
                    self._count_merged(update)
            case "rejected":
                self._rejected.labels(record["reason"]).inc()
            case "abandoned":
                self._abandoned.labels(record["reason"]).inc()
            case "evaluation":
                if "error" in record:
                    self._failed.inc()
                for name, value in record["metrics"].items():
                    self._evaluation.labels(name).set(value)

    def _count_merged(self, update: Mapping[str, Any]) -> None:
        client = update["client"]
        self._merged.labels(client if client in self._named else OTHER).inc()
        self._staleness.observe(update["staleness"])
        self._training_seconds.observe(update["training_seconds"])
        if "norm" in update:
            self._norm.observe(update["norm"])

    def dispatched(self) -> None:
        """Count a job."""
        self._dispatched.inc()

    def received(self, nbytes: int) -> None:
        """Count the bytes of a payload."""
        self._bytes.inc(nbytes)

    def measured_memory(self, used: int, limit: int) -> None:
        """Show the memory of Redis."""
        self._used.set(used)
        self._limit.set(limit)

    def lost_connection(self) -> None:
        """Count an outage."""
        self._outages.inc()

    def progressed(self, federation: Federation, now: float) -> None:
        """Show what the federation is like, at most once in SAMPLE_SECONDS."""
        if (at := self._clock()) < self._next:
            return
        self._next = at + SAMPLE_SECONDS
        self._open.set(len(federation.open_jobs))
        self._buffered.set(federation.buffered)
        self._clients.set(len(federation.clients))
        alive = self._named.intersection(federation.clients)
        if alive != self._looked_at_clients:
            self._looked_at_clients = alive
            for client in self._named:
                self._client.labels(client).set(client in alive)
        awaited = federation.awaited_keeper
        for keeper in self._keepers:
            self._awaited.labels(keeper).set(now - awaited[1] if awaited and awaited[0] == keeper else 0.0)
