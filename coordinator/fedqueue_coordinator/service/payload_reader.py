"""Reads the payloads of updates and their base versions from Redis, with as little memory as the aggregation allows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, cast

import numpy as np
import torch

from fedqueue.errors import FedqueueError, SignatureError, StoreError
from fedqueue.protocol.signed_envelope import new_digest
from fedqueue.tensors.blobs import CHUNK, BlobBuffer, slices
from fedqueue.tensors.codec import Codec
from fedqueue.tensors.frame import PIECE, Delta, Frame, Piece, add_pieces, split_tail
from fedqueue.tensors.manifest import Manifest, align
from fedqueue_coordinator.core.events import Load
from fedqueue_coordinator.core.federation import Federation
from fedqueue_coordinator.service.coordinator_store import CoordinatorStore


class PayloadReader:
    """Carries out `Load` for one federation.

    A payload is read into the accumulator's own memory while that is empty, else into one buffer beside it. A plain
    payload of more than a chunk that finds the accumulator in use is streamed (`StreamedPayload`). So a coordinator
    needs memory for the model and one more payload, however many updates are on their way. If the aggregation keeps
    its updates, each payload gets memory of its own.
    """

    def __init__(self, store: CoordinatorStore, federation: Federation) -> None:
        self._store = store
        self._federation = federation
        self._buffer = np.empty(0, np.uint8)
        if federation.takes_pieces:
            compile_encoding(federation.uplink)

    def read(self, load: Load) -> Delta:
        """Read the payload; the delta is valid until the update is merged or rejected.

        Raises BlobMissing, StoreError or SignatureError as `CoordinatorStore.read_payload`, and WireError for bytes
        that are not a frame.
        """
        arrived, header = load.arrived, load.header
        codec, store = self._federation.uplink, self._store
        memory = self._memory_for(header.nbytes)
        if memory is None:
            read = partial(store.ahead.read_span, store.keys.payload(arrived.job, arrived.attempt))
            return StreamedPayload(codec.manifest, read, header.digest if store.identity else "")
        store.read_payload(arrived.job, arrived.attempt, header.digest, memory)
        return codec.decode(memory)

    def _memory_for(self, nbytes: int) -> BlobBuffer | None:
        """Return memory for a payload of `nbytes` ≤ `codec.largest` bytes; None for a payload that is streamed."""
        codec = self._federation.uplink
        if not self._federation.takes_pieces:
            return np.empty(nbytes, np.uint8)
        free = self._federation.free_memory
        if codec.identity and free is not None:
            return free
        if codec.identity and nbytes > CHUNK:
            return None
        if self._buffer.nbytes < nbytes:
            self._buffer = np.empty(codec.largest, np.uint8)
        return self._buffer[:nbytes]


def compile_encoding(codec: Codec) -> None:
    """Add an empty encoded update, so that the loop is compiled now and not while the first update waits."""
    if codec.encoding:
        codec.encoding.add(np.zeros(codec.encoding.size(0), np.uint8), torch.empty(0), 1.0, True)


class PayloadChanged(FedqueueError):
    """A payload changed or vanished after it was found valid: the accumulator contains a part of it."""


class StreamedPayload:
    """A `Delta` that stays in Redis while it is merged: each pass reads it again, so it needs no memory of its size.

    The first pass over its pieces checks the digest, and every later pass checks it again. `read(start, into, whole)`
    fills `into` with the payload's bytes from byte `start` on, out of `whole` bytes. Buffers and counters, which are
    few, are read at once. A pass raises StoreError for missing bytes, SignatureError for bytes with another digest
    than `digest` (or than the first pass found, if `digest` is empty), and PayloadChanged for either after a valid
    pass.
    """

    def __init__(self, manifest: Manifest, read: Callable[[int, BlobBuffer, int], None], digest: str = "") -> None:
        self.manifest = manifest
        self._read = read
        self._digest = digest
        self._valid = False
        edge = 4 * manifest.parameters
        start = edge // 8 * 8  # so that what follows the float32 section is aligned
        tail = np.empty(manifest.nbytes - start, np.uint8)
        read(start, tail, manifest.nbytes)
        self._tail = tail[edge - start :]
        self.buffers = torch.from_numpy(tail[edge - start : 4 * manifest.floats - start].view(np.float32))
        rest = split_tail(manifest, tail[align(4 * manifest.floats) - start :])
        self.doubles, self.counters, self.changed = rest

    def pieces(self) -> Iterator[Piece]:
        """As `Delta.pieces`; raises as the class says."""
        try:
            yield from self._checked()
        except (StoreError, SignatureError) as error:
            if self._valid:
                raise PayloadChanged(f"the payload changed while it was merged: {error}") from error
            raise
        self._valid = True

    def add_to(self, into: torch.Tensor, weight: float, first: bool) -> None:
        """As `Delta.add_to`; raises as `pieces`."""
        add_pieces(self.pieces(), into, weight, first)

    def whole(self) -> Frame:
        """As `Delta.whole`; raises as `pieces`."""
        frame = Frame(self.manifest, np.empty(self.manifest.nbytes, np.uint8))
        for where, values in self.pieces():
            frame.parameters[where] = values
        frame.buffer[4 * self.manifest.parameters :] = self._tail
        return frame

    def _checked(self) -> Iterator[Piece]:
        digest, parameters = new_digest(), self.manifest.parameters
        scratch: BlobBuffer = np.empty(4 * min(PIECE, parameters), np.uint8)
        for where in slices(parameters, PIECE):
            part = scratch[: 4 * (where.stop - where.start)]
            self._read(4 * where.start, part, self.manifest.nbytes)
            digest.update(cast(Any, part))
            yield where, torch.from_numpy(part.view(np.float32))
        digest.update(cast(Any, self._tail))
        found = digest.hexdigest()
        if found != (self._digest or found):
            raise SignatureError(f"its digest is {found[:12]}…, expected {self._digest[:12]}…")
        self._digest = found


class BaseVersions:
    """Caches decoded base versions on first use; unused when the aggregation needs no base."""

    def __init__(self, store: CoordinatorStore, federation: Federation) -> None:
        self._store = store
        self._federation = federation
        self._frames: dict[int, Frame] = {}
        wire = federation.downlink.encode(federation.model, federation.version) if federation.needs_base else None
        self.keep_stored(set(store.stored_versions()), wire)

    def keep_stored(self, stored: set[int], wire: BlobBuffer | None) -> None:
        """Add the newest version, published as `wire`, and drop the versions that are not `stored` any more."""
        if self._federation.needs_base and wire is not None:
            self._frames = {version: frame for version, frame in self._frames.items() if version in stored}
            self._frames[self._federation.version] = self._federation.downlink.received(wire)

    def frame(self, version: int) -> Frame:
        """Return the version as workers receive it; raises as `CoordinatorStore.read_model`."""
        if version not in self._frames:
            self._frames[version] = self._store.read_model(version, self._federation.downlink)
        return self._frames[version]
