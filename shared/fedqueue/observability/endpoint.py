"""Serves a process's metrics over HTTP, and collects those of its child processes.

Several worker processes have one address: each writes its numbers to files in a folder that they share, with
prometheus_client's multiprocess mode, and their parent adds them up at each scrape. So the address does not depend on
the number of processes, and what a process has counted is not lost when it ends.
"""

from __future__ import annotations

import os
import shutil
import socket
import socketserver
import tempfile
import threading
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

import structlog

from fedqueue.config.observability import host_and_port
from fedqueue.errors import ConfigurationError, MissingExtra
from fedqueue.observability.catalogue import Metric

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

log = structlog.get_logger("fedqueue.metrics")

FOLDER = "_FEDQUEUE_METRICS_FOLDER"
"""The environment variable that names the folder of a process whose parent serves its metrics."""
SCRAPE_SECONDS = 10.0  # after which a connection that sends no request is closed


class _Handler(WSGIRequestHandler):
    timeout = SCRAPE_SECONDS

    def log_message(self, format: str, *args: Any) -> None:
        """Log no request."""


class _Server(socketserver.ThreadingMixIn, WSGIServer):
    daemon_threads = True

    def __init__(self, host: str, port: int) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), _Handler)

    def server_bind(self) -> None:
        """As in the base class, without looking up the name of this machine."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])
        self.setup_environ()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore a scraper that has gone away."""


class Endpoint:
    """An address that is bound, and answers once `start` was called."""

    def __init__(self, address: str) -> None:
        """Raises ConfigurationError if the address cannot be bound, MissingExtra without prometheus_client."""
        require_prometheus()
        host, port = host_and_port(address)
        self._thread: threading.Thread | None = None
        try:
            self._server = _Server(host, port)
        except OSError as error:
            raise ConfigurationError(
                "observability.metrics_address", address, f"cannot listen there: {error.strerror or error}",
                "choose another port with --metrics, or end the process that has it",
            ) from None  # fmt: skip

    @property
    def url(self) -> str:
        """Where the metrics are."""
        host, port = self._server.server_name, self._server.server_port
        return f"http://{f'[{host}]' if ':' in host else host}:{port}/metrics"

    def start(self, registry: CollectorRegistry) -> None:
        """Serve `registry` on a thread of its own."""
        from prometheus_client import make_wsgi_app

        self._server.set_app(make_wsgi_app(registry))
        self._thread = threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True)
        self._thread.start()
        log.info("metrics are served", at=self.url)

    def stop(self) -> None:
        """Answer no longer."""
        if self._thread:
            self._server.shutdown()
            self._thread.join()
        self.close()

    def close(self) -> None:
        """Give the address back, in a process that does not serve it."""
        self._server.server_close()


class SharedFolder:
    """A folder with the numbers of the child processes that this process starts from now on, until `delete`."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="fedqueue-metrics-"))
        os.environ[FOLDER] = str(self.path)

    def add_to(self, registry: CollectorRegistry) -> None:
        """Let `registry` show the sums over the processes that write to this folder."""
        from prometheus_client.multiprocess import MultiProcessCollector

        MultiProcessCollector(registry, str(self.path))

    def delete(self) -> None:
        """Delete the folder."""
        os.environ.pop(FOLDER, None)
        shutil.rmtree(self.path, ignore_errors=True)


def require_prometheus() -> None:
    """Raise MissingExtra if prometheus_client is not installed."""
    if find_spec("prometheus_client") is None:
        raise MissingExtra("--metrics", "prometheus-client", "metrics")


def open_endpoint(address: str | None) -> Endpoint | None:
    """Bind the address; None where metrics are off, or where the parent of this process serves them."""
    return None if address is None or os.environ.get(FOLDER) else Endpoint(address)


def own_registry(endpoint: Endpoint | None) -> CollectorRegistry | None:
    """Return the registry of this process, served by `endpoint` or through the parent's folder; None without both."""
    folder = os.environ.get(FOLDER)
    if endpoint is None and not folder:
        return None
    if folder:
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder  # read by the import below
    from prometheus_client import CollectorRegistry

    registry = CollectorRegistry()
    if endpoint:
        endpoint.start(registry)
    return registry


def serve_folder(endpoint: Endpoint, folder: SharedFolder) -> None:
    """Serve the sums over the processes that write to `folder`; this process does not write there."""
    from prometheus_client import CollectorRegistry

    registry = CollectorRegistry()
    folder.add_to(registry)
    endpoint.start(registry)


def forget_process(pid: int) -> None:
    """Count a child process that has ended among the living ones no longer, if its metrics are collected."""
    if folder := os.environ.get(FOLDER):
        from prometheus_client.multiprocess import mark_process_dead

        mark_process_dead(pid, folder)


def make(metric: Metric, registry: CollectorRegistry) -> Any:
    """Make the collector of a metric: a Counter, Gauge or Histogram of prometheus_client."""
    from prometheus_client import Counter, Gauge, Histogram, disable_created_metrics

    disable_created_metrics()  # a second series for each
    match metric.kind:
        case "counter":
            return Counter(metric.name, metric.help, metric.labels, registry=registry)
        case "gauge":
            return Gauge(metric.name, metric.help, metric.labels, registry=registry, multiprocess_mode=metric.together)
        case "histogram":
            return Histogram(metric.name, metric.help, metric.labels, registry=registry, buckets=metric.buckets)
