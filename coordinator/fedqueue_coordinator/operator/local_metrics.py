"""One address for the metrics of a local run: those of the coordinator, and the sums over its workers and keepers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from fedqueue.config.schema import Config
from fedqueue.observability.endpoint import Endpoint, SharedFolder, open_endpoint
from fedqueue_coordinator.core.observer import RunObserver


class LocalMetrics:
    """The address, which is bound, and the folder to which workers and keepers write."""

    def __init__(self, endpoint: Endpoint, folder: SharedFolder) -> None:
        self._endpoint, self._folder = endpoint, folder

    def serve(self, config: Config) -> RunObserver:
        """Begin to answer; the returned observer counts what the coordinator does."""
        from prometheus_client import CollectorRegistry

        from fedqueue_coordinator.service.run_metrics import RunMetrics

        registry = CollectorRegistry()
        self._folder.add_to(registry)
        self._endpoint.start(registry)
        return RunMetrics(config, registry)


@contextlib.contextmanager
def shared_metrics(config: Config) -> Iterator[LocalMetrics | None]:
    """Bind the address of the metrics, before the run has changed anything; None where metrics are off.

    Child processes that start in the meantime write their metrics to a folder of the run.
    """
    endpoint = open_endpoint(config.observability.metrics_address)
    if endpoint is None:
        yield None
        return
    folder = SharedFolder()
    try:
        yield LocalMetrics(endpoint, folder)
    finally:
        endpoint.stop()
        folder.delete()
