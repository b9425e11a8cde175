"""Counts what a keeper does, for Prometheus. Each method is called where the thing happens."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from fedqueue.observability import catalogue
from fedqueue.observability.endpoint import make

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry


class KeeperObserver:
    """Is told of a keeper's answers. This one does nothing."""

    def offered(self, refusal: str) -> None:
        """An update was offered; `refusal` is empty if the keeper can take its mask off."""

    def released(self) -> None:
        """The sum of the masks of a cohort was released."""

    def refused_cohort(self, reason: str) -> None:
        """A cohort was refused."""


UNOBSERVED = KeeperObserver()


class KeeperMetrics(KeeperObserver):
    """The metrics of `catalogue.KEEPER`."""

    def __init__(self, registry: CollectorRegistry, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._offers = make(catalogue.KEEPER_OPENED, registry)
        self._refusals = make(catalogue.KEEPER_REFUSED, registry)
        self._released = make(catalogue.KEEPER_RELEASED, registry)
        self._last = make(catalogue.KEEPER_LAST_RELEASE, registry)

    def offered(self, refusal: str) -> None:
        """Count an offer."""
        self._offers.inc()
        if refusal:
            self._refusals.labels("offer", refusal).inc()

    def released(self) -> None:
        """Count a release."""
        self._released.inc()
        self._last.set(self._clock())

    def refused_cohort(self, reason: str) -> None:
        """Count a refusal."""
        self._refusals.labels("cohort", reason).inc()
