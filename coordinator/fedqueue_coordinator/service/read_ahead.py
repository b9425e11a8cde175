"""Prefetches the next blob while the present one is merged, so that network transfer and merging overlap."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import redis

from fedqueue.errors import StoreError
from fedqueue.tensors.blobs import CHUNK, BlobBuffer
from fedqueue.transport.store import Store

LEAST = 1024 * 1024  # bytes: reading a smaller blob takes less time than handing it to a thread
MOST_AHEAD = CHUNK  # bytes that are prefetched of one blob


class ReadAhead:
    """Reads blobs of `store`, and prefetches the beginning of the next expected one.

    At most `MOST_AHEAD` bytes are prefetched, into memory that is allocated once. One thread may use an instance; a
    second thread fetches. Prefetch errors are ignored; the foreground read reports them.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._thread = ThreadPoolExecutor(1, "read-ahead")
        self._memory: BlobBuffer = np.empty(0, np.uint8)
        self._expected: deque[tuple[str, int]] = deque()
        self._coming: tuple[str, Future[BlobBuffer]] | None = None

    def expect(self, blobs: Iterable[tuple[str, int]]) -> None:
        """Expect these blobs (prefix, bytes) to be read next, in this order, instead of those expected before."""
        self._expected = deque((prefix, nbytes) for prefix, nbytes in blobs if nbytes >= LEAST)
        if self._expected:
            self._fetch_next()

    def read_span(self, prefix: str, start: int, into: BlobBuffer, whole: int) -> None:
        """Fill `into` from byte `start` of a blob of `whole` bytes; raises as `Store.read_span`."""
        while any(expected == prefix for expected, _ in self._expected):
            self._fetch_next()  # the blobs before it are not read after all
        copied = 0
        if self._coming and self._coming[0] == prefix:
            fetched = self._coming[1].result()
            copied = max(0, min(into.nbytes, fetched.nbytes - start))
            into[:copied] = fetched[start : start + copied]
            if start <= fetched.nbytes <= start + copied:  # its last byte was copied
                self._fetch_next()
        if copied < into.nbytes:
            self._store.read_span(prefix, start + copied, into[copied:], whole)

    def _fetch_next(self) -> None:
        """Begin to fetch the next expected blob, over the memory of the present one."""
        if self._coming:
            self._coming[1].result()
        self._coming = None
        if self._expected:
            prefix, nbytes = self._expected.popleft()
            ahead = min(nbytes, MOST_AHEAD)
            if self._memory.nbytes < ahead:
                self._memory = np.empty(ahead, np.uint8)
            buffer = self._memory[:ahead]
            self._coming = (prefix, self._thread.submit(self._fetch, prefix, buffer, nbytes))

    def _fetch(self, prefix: str, buffer: BlobBuffer, whole: int) -> BlobBuffer:
        """Return what was fetched: all of `buffer`, or none of it after an error."""
        try:
            self._store.read_span(prefix, 0, buffer, whole)
        except (StoreError, redis.RedisError):
            return buffer[:0]
        return buffer
