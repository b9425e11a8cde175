"""A worker's store whose calls are repeated until Redis answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from fedqueue.protocol.messages import Ending, Order, Unavailable, Update
from fedqueue.protocol.post_result import PostResult
from fedqueue.protocol.run_info import RunInfo
from fedqueue.tensors.blobs import BlobBuffer
from fedqueue.tensors.codec import Codec
from fedqueue.tensors.frame import Frame
from fedqueue.transport.retry import RedisRetry
from fedqueue.transport.worker_store import Claim, WorkerStore
from fedqueue.transport.zero_copy import Command


class RetryingStore:
    """The calls of WorkerStore that are safe to repeat, each repeated through an outage of Redis.

    Every method raises ServerUnavailable where waiting cannot help, or once `given_up()` is true.
    """

    def __init__(self, store: WorkerStore, given_up: Callable[[], bool]) -> None:
        self._store = store
        self._retry = RedisRetry(given_up)

    def info(self) -> RunInfo:
        """As `WorkerStore.info`."""
        return self._retry.call(self._store.info)

    def join(self, candidates: Sequence[str], lease_seconds: float) -> str | None:
        """As `WorkerStore.join`."""
        return self._retry.call(partial(self._store.join, candidates, lease_seconds))

    def report_unavailable(self, unavailable: Unavailable) -> None:
        """As `WorkerStore.report_unavailable`."""
        self._retry.call(partial(self._store.report_unavailable, unavailable))

    def open_order(self, order: bytes | dict[str, Any]) -> Order:
        """As `WorkerStore.open_order`."""
        return self._retry.call(partial(self._store.open_order, order))

    def claim(self, job: str, lease_seconds: float, client: str) -> Claim:
        """As `WorkerStore.claim`."""
        return self._retry.call(partial(self._store.claim, job, lease_seconds, client))

    def fetch_model(self, version: int, codec: Codec, into: Frame) -> None:
        """As `WorkerStore.fetch_model`."""
        self._retry.call(partial(self._store.fetch_model, version, codec, into))

    def fetch_frozen(self, nbytes: int) -> BlobBuffer | None:
        """As `WorkerStore.fetch_frozen`."""
        return self._retry.call(partial(self._store.fetch_frozen, nbytes))

    def release_base(self, claim: Claim) -> None:
        """As `WorkerStore.release_base`."""
        self._retry.call(partial(self._store.release_base, claim))

    def post(self, claim: Claim, update: Update, payload: BlobBuffer, then: Sequence[Command]) -> PostResult:
        """As `WorkerStore.post`."""
        return self._retry.call(partial(self._store.post, claim, update, payload, then))

    def end(self, claim: Claim, ending: Ending) -> PostResult:
        """As `WorkerStore.end`."""
        return self._retry.call(partial(self._store.end, claim, ending))
