"""The coordinator's part of each update's trace: its dispatch, its merge or rejection, and the version with it.

dispatch                    coordinator, when the job is opened; its traceparent is in the order
  job                       worker; its traceparent is in the update's header
    claim, fetch, train, encode, post
    merge | reject          coordinator, from the moment the payload is read until the commit
version                     coordinator, a trace of its own, with a link to each `merge`
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from fedqueue.protocol.messages import Order
from fedqueue.protocol.msgpack import unpack
from fedqueue.tracing import Tracing
from fedqueue_coordinator.core.events import Commit, UpdateArrived


class UpdateTraces:
    """Makes spans for jobs and versions. A job that an earlier coordinator dispatched has the trace of its header."""

    def __init__(self, tracing: Tracing) -> None:
        self._tracing = tracing
        self._dispatched: dict[str, str] = {}  # open job → traceparent of its dispatch
        self._read: dict[str, int] = {}  # open job → when its payload was read, in nanoseconds since 1970

    def dispatching(self, order: Order) -> Order:
        """Return the order with the traceparent of its dispatch, a span of no length."""
        if not self._tracing.on:
            return order
        with self._tracing.span("dispatch", kind="producer", job=order.job, client=order.client) as traceparent:
            self._dispatched[order.job] = traceparent
        return order.model_copy(update={"traceparent": traceparent})

    def reading(self, arrived: UpdateArrived) -> None:
        """Note when the payload of an update is read."""
        if self._tracing.on:
            self._read[arrived.job] = time.time_ns()

    def committed(self, commit: Commit) -> None:
        """End the traces of the updates that are part of a version which is committed."""
        if not self._tracing.on:
            return
        version, links = commit.version, []
        started = min((self._read.get(arrived.job, time.time_ns()) for arrived in commit.merged), default=None)
        for arrived, line in zip(commit.merged, commit.record["merged"], strict=True):
            begun = self._read.get(arrived.job)
            about = {"staleness": line["staleness"], "weight": line["weight"]}
            with self._of_job("merge", arrived.job, _traceparent(arrived), begun, version=version, **about) as merged:
                links.append(merged)
        with self._tracing.span("version", start=started, links=links, version=version, updates=len(links)):
            pass

    def closed(self, record: Mapping[str, Any]) -> None:
        """End the trace of a job that is rejected or abandoned, by its ledger record."""
        if not self._tracing.on:
            return
        name = {"rejected": "reject", "abandoned": "abandon"}[record["kind"]]
        begun = self._read.get(record["job"])
        with self._of_job(name, record["job"], "", begun, error=record["reason"], reason=record["reason"]):
            pass

    def _of_job(self, name: str, job: str, parent: str, begun: int | None, **attributes: Any) -> Any:
        """A span of an open job, which is forgotten."""
        dispatched, _ = self._dispatched.pop(job, ""), self._read.pop(job, None)
        return self._tracing.span(name, parent or dispatched, start=begun, job=job, **attributes)


def _traceparent(arrived: UpdateArrived) -> str:
    """What the header of a merged update says, which has been validated."""
    header: dict[str, Any] = unpack(arrived.body)
    return str(header.get("traceparent", ""))
