"""The next blob is on its way while the present one is used: on a network, fetching and merging overlap."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import redis

from fedqueue.errors import StoreError
from fedqueue.transport.store import CHUNK, BlobBuffer, Store

LEAST = 1024 * 1024  # bytes: a smaller blob is here sooner than another thread could be asked for it


class ReadAhead:
    """Reads blobs of `store`; of one that it was told to expect, the beginning may be here already.

    No more than `CHUNK` bytes are held, in memory that is taken once. It is for one thread; a second one fetches.
    What cannot be fetched is not missed: whoever reads it hears why.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._thread = ThreadPoolExecutor(1, "read-ahead")
        self._memory: BlobBuffer = np.empty(0, np.uint8)
        self._expected: deque[tuple[str, int]] = deque()
        self._coming: tuple[str, Future[BlobBuffer]] | None = None

    def expect(self, blobs: Iterable[tuple[str, int]]) -> None:
        """These blobs (prefix, bytes) will be read next, in this order; what was expected before, will not."""
        self._expected = deque((prefix, nbytes) for prefix, nbytes in blobs if nbytes >= LEAST)
        if self._expected:
            self._fetch_next()

    def read_span(self, prefix: str, start: int, into: BlobBuffer, whole: int) -> None:
        """As `Store.read_span`."""
        while any(expected == prefix for expected, _ in self._expected):
            self._fetch_next()  # what comes before it was not wanted after all
        here = 0
        if self._coming and self._coming[0] == prefix:
            held = self._coming[1].result()
            here = max(0, min(into.nbytes, held.nbytes - start))
            into[:here] = held[start : start + here]
            if start <= held.nbytes <= start + here:  # all of it was taken
                self._fetch_next()
        if here < into.nbytes:
            self._store.read_span(prefix, start + here, into[here:], whole)

    def _fetch_next(self) -> None:
        """Called when nobody needs what is held."""
        if self._coming:
            self._coming[1].result()
        self._coming = None
        if self._expected:
            prefix, nbytes = self._expected.popleft()
            ahead = min(nbytes, CHUNK)
            if self._memory.nbytes < ahead:
                self._memory = np.empty(ahead, np.uint8)
            place = self._memory[:ahead]
            self._coming = (prefix, self._thread.submit(self._fetch, prefix, place, nbytes))

    def _fetch(self, prefix: str, place: BlobBuffer, whole: int) -> BlobBuffer:
        try:
            self._store.read_span(prefix, 0, place, whole)
        except (StoreError, redis.RedisError):
            return place[:0]
        return place
