"""Masked updates and sums of masks in Redis: words of 32 bits, which are checked against the digest that was signed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, cast

import numpy as np

from fedqueue.errors import SignatureError, StoreError
from fedqueue.protocol.signed_envelope import new_digest
from fedqueue.secure.ring import Words
from fedqueue.tensors.blobs import CHUNK, BlobBuffer, slices
from fedqueue.transport.blob_store import READ
from fedqueue_coordinator.core.events import Load, MaskedVector, WholeWords
from fedqueue_coordinator.core.federation import Federation
from fedqueue_coordinator.service.coordinator_store import CoordinatorStore
from fedqueue_coordinator.service.payload_reader import PayloadChanged

ReadSpan = Callable[[int, BlobBuffer, int], None]
"""Fills an array with a blob's bytes from a position on; the third argument is the blob's size. Raises StoreError."""


class StreamedWords:
    """A masked vector that stays in Redis while it is added, so that it needs no memory of its size."""

    def __init__(self, read: ReadSpan, nbytes: int, digest: str) -> None:
        self._read, self._nbytes, self._digest = read, nbytes, digest

    def pieces(self) -> Iterator[Words]:
        """As `MaskedVector.pieces`; raises PayloadChanged for other words, after these were yielded."""
        try:
            yield from self._checked()
        except (SignatureError, StoreError) as error:
            raise PayloadChanged(f"masked words changed while they were added: {error}") from error

    def check(self) -> None:
        """Read all words; raises as `read_words`."""
        for _ in self._checked():
            pass

    def _checked(self) -> Iterator[Words]:
        digest, scratch = new_digest(), np.empty(min(READ, self._nbytes), np.uint8)
        for where in slices(self._nbytes, READ):
            part = scratch[: where.stop - where.start]
            self._read(where.start, part, self._nbytes)
            digest.update(cast(Any, part))
            yield part.view(np.uint32)
        _require(self._digest, digest.hexdigest())


def read_words(read: ReadSpan, nbytes: int, digest: str, memory: BlobBuffer | None = None) -> MaskedVector:
    """Return a masked vector of `nbytes` bytes: read into `memory`, as much as fits, or streamed if it is large.

    Raises StoreError for missing bytes, and SignatureError for bytes with another digest.
    """
    if memory is None and nbytes > CHUNK:
        streamed = StreamedWords(read, nbytes, digest)
        streamed.check()
        return streamed
    head = np.empty(nbytes, np.uint8) if memory is None else memory[:nbytes]
    tail = np.empty(nbytes - head.nbytes, np.uint8)  # a number of examples behind the parameters
    found = new_digest()
    for start, part in ((0, head), (head.nbytes, tail)):
        if part.nbytes:
            read(start, part, nbytes)
            found.update(cast(Any, part))
    _require(digest, found.hexdigest())
    return WholeWords(head.view(np.uint32), tail.view(np.uint32))


def read_masked_update(store: CoordinatorStore, federation: Federation, load: Load) -> MaskedVector:
    """Read a masked payload: into the sum's memory while that is empty. It is valid until it is added or rejected.

    Raises BlobMissing, StoreError and SignatureError as `read_words`.
    """
    read = partial(store.ahead.read_span, store.keys.payload(load.arrived.job, load.arrived.attempt))
    return read_words(read, load.header.nbytes, load.header.digest, federation.free_memory)


def _require(expected: str, found: str) -> None:
    if found != expected:
        raise SignatureError(f"its digest is {found[:12]}…, expected {expected[:12]}…")
