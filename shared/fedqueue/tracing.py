"""Traces of OpenTelemetry: where they are switched on, a process makes spans; otherwise nothing is made or imported.

A span's context crosses Redis as text, the `traceparent` of the W3C's Trace Context.
"""

from __future__ import annotations

import contextlib
import secrets
import threading
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal, Self

from fedqueue.errors import MissingExtra

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider as SdkProvider
    from opentelemetry.trace import Span, TracerProvider

SHUTDOWN_SECONDS = 5.0
"""How long the end of a process waits until its last spans have reached the collector."""
Kind = Literal["internal", "producer", "consumer"]
_NO_SPAN = contextlib.nullcontext("")


class Tracing:
    """Makes no spans. As a context manager, it stops at the end of the block."""

    on = False
    """Whether spans are made."""

    def span(
        self,
        name: str,
        parent: str = "",
        kind: Kind = "internal",
        start: int | None = None,
        links: Iterable[str] = (),
        error: str = "",
        **attributes: str | int | float,
    ) -> AbstractContextManager[str]:
        """Make a span of what is done in the block; the value is its traceparent, empty where none is made.

        It is a child of `parent`, a traceparent, or else of the span of the block around it. `start` is its start in
        nanoseconds since 1970 if that was before the block, `links` the traceparents of other spans. With `error`, it
        has failed.
        """
        return _NO_SPAN

    def stop(self) -> None:
        """Send the last spans, for SHUTDOWN_SECONDS at most."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


class OpenTelemetryTracing(Tracing):
    """Makes spans by the SDK of OpenTelemetry; the attributes of its spans begin with `fedqueue.`."""

    on = True

    def __init__(self, provider: TracerProvider, stop_seconds: float = SHUTDOWN_SECONDS) -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider, self._stop_seconds = provider, stop_seconds
        self._tracer = provider.get_tracer("fedqueue")
        self._propagator = TraceContextTextMapPropagator()

    @contextlib.contextmanager
    def span(
        self,
        name: str,
        parent: str = "",
        kind: Kind = "internal",
        start: int | None = None,
        links: Iterable[str] = (),
        error: str = "",
        **attributes: str | int | float,
    ) -> Iterator[str]:
        """As `Tracing.span`; an exception that leaves the block is recorded."""
        from opentelemetry.trace import Link, SpanKind, Status, StatusCode

        with self._tracer.start_as_current_span(
            name,
            context=self._context(parent) if parent else None,
            kind=SpanKind[kind.upper()],
            attributes={f"fedqueue.{key}": value for key, value in attributes.items()},
            links=[Link(self._span(link).get_span_context()) for link in links if link],
            start_time=start,
        ) as span:
            if error:
                span.set_status(Status(StatusCode.ERROR, error))
            carrier: dict[str, str] = {}
            self._propagator.inject(carrier)
            yield carrier.get("traceparent", "")

    def stop(self) -> None:
        """Send the last spans on a thread that is not waited for longer, as a collector may be away."""
        shutdown = getattr(self._provider, "shutdown", None)  # the API's provider has none
        if shutdown:
            thread = threading.Thread(target=shutdown, name="last spans", daemon=True)
            thread.start()
            thread.join(self._stop_seconds)

    def _context(self, traceparent: str) -> Context:
        return self._propagator.extract({"traceparent": traceparent})

    def _span(self, traceparent: str) -> Span:
        from opentelemetry.trace import get_current_span

        return get_current_span(self._context(traceparent))


NO_TRACING = Tracing()


def start_tracing(on: bool, service: str) -> Tracing:
    """Return the tracing of this process: by OTLP to the collector that the environment variables OTEL_… name.

    `service` is the service's name where OTEL_SERVICE_NAME gives none. A provider that this process has set before, as
    `opentelemetry-instrument` does, is used as it is. Raises MissingExtra.
    """
    if not on:
        return NO_TRACING
    for package in ("opentelemetry", "opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http"):
        if not _is_installed(package):
            raise MissingExtra("opentelemetry.traces", "opentelemetry-sdk and its OTLP exporter", "opentelemetry")
    from opentelemetry import trace
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource
    from opentelemetry.sdk.trace import TracerProvider as SdkProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    current: Any = trace.get_tracer_provider()
    if isinstance(current, SdkProvider):
        return OpenTelemetryTracing(current)
    named = Resource({"service.name": service}).merge(OTELResourceDetector().detect())
    provider = make_provider(Resource.create().merge(named))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return OpenTelemetryTracing(provider)


def make_provider(resource: Resource | None = None) -> SdkProvider:
    """Return a provider whose ids are drawn from the operating system.

    The SDK's own come from Python's global generator. A run seeds that, so that two runs would have the same ids; and
    drawing from it would change what a task draws.
    """
    from opentelemetry.sdk.trace import TracerProvider as SdkProvider

    ids: Any = _SystemIds()
    return SdkProvider(resource=resource, id_generator=ids, shutdown_on_exit=False)  # `Tracing.stop` does it


class _SystemIds:
    """An `opentelemetry.sdk.trace.id_generator.IdGenerator`, without its import."""

    def generate_span_id(self) -> int:
        return secrets.randbelow(2**64 - 1) + 1  # 0 is no id

    def generate_trace_id(self) -> int:
        return secrets.randbelow(2**128 - 1) + 1

    def is_trace_id_random(self) -> bool:
        return True


def _is_installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:  # a package above it is missing
        return False
