"""Versions and payloads on their way between Redis and a worker: piece by piece, and resumed at the missing piece.

`step` moves the next piece and returns whether there is another one. It may be repeated after an error of Redis: what
has arrived is not sent a second time. A small blob travels in one round trip together with what belongs to it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from fedqueue.protocol.msgpack import MAX_MESSAGE
from fedqueue.tensors import blobs
from fedqueue.tensors.blobs import BlobBuffer
from fedqueue.transport import blob_store
from fedqueue.transport.blob_store import BlobStore, part_of_chunk, require_part
from fedqueue.transport.line_speed import LineSpeed
from fedqueue.transport.zero_copy import Command, Moved, Part, get_parts

PAYLOAD_SECONDS = 3600  # after its last piece, a payload expires unless it is posted
MOST_APPENDED = 4 * 1024 * 1024  # bytes of a piece that a script appends, because Redis copies a script's arguments


class Download:
    """A blob on its way to a worker."""

    def __init__(
        self, store: BlobStore, speed: LineSpeed, prefix: str, into: BlobBuffer, signature_key: str, moved: Moved
    ) -> None:
        """`into` receives the blob at `prefix`; `signature_key`: where its envelope is, if it has one."""
        self.into = into
        self.envelope: bytes | None = None if signature_key else b""
        """The envelope that signs the blob, once it has arrived; empty without a `signature_key`."""
        self._store, self._speed, self._moved = store, speed, moved
        self._prefix, self._signature = prefix, Part(signature_key, 0, MAX_MESSAGE)
        self._done = 0

    def step(self) -> bool:
        """Receive the next piece; raises as `read_blob`."""
        store, whole = self._store, self.into.nbytes
        size = min(self._speed.piece, whole - self._done)
        if self.envelope is None and size == whole <= min(blob_store.READ, blobs.CHUNK):
            part = part_of_chunk(f"{self._prefix}:0", 0, self.into, whole)
            with self._speed.measured(whole):
                got, envelope = get_parts(store.redis, [part, self._signature], self._moved)
            require_part(part, got, whole)
            self._done, self.envelope = whole, cast(bytes, envelope)
        elif size:
            with self._speed.measured(size):
                store.read_span(self._prefix, self._done, self.into[self._done :][:size], whole, self._moved)
            self._done += size
        elif self.envelope is None:
            self.envelope = cast(bytes, get_parts(store.redis, [self._signature])[0])
        return self._done < whole or self.envelope is None


class Upload:
    """An attempt's payload on its way to Redis, where it waits for the attempt's post."""

    def __init__(
        self,
        store_piece: Callable[[int, Any, list[Command]], int],
        speed: LineSpeed,
        prefix: str,
        payload: BlobBuffer,
        moved: Moved,
    ) -> None:
        """`store_piece(start, piece, first)` appends bytes, or checks what `first` stored.

        It returns the number of bytes stored without a gap, or −1 if the job is not open for the attempt.
        """
        self._store_piece, self._speed, self._prefix, self._payload = store_piece, speed, prefix, payload
        self.moved = moved
        self._stored = 0
        self._refused = False

    def step(self) -> bool:
        """Store the next piece of a payload that does not travel with the post.

        Returns False too if the job is not open for this attempt: the post then says why.
        """
        whole, start, chunk_bytes = self._payload.nbytes, self._stored, blobs.CHUNK
        if start >= whole or self._refused or self.travels_with_post:
            return False
        chunk, offset = divmod(start, chunk_bytes)
        left = self._payload[start : min(whole, (chunk + 1) * chunk_bytes)]
        whole_chunk = not offset and left.nbytes <= self._speed.piece
        piece = left if whole_chunk else left[: min(self._speed.piece, MOST_APPENDED)]
        with self._speed.measured(piece.nbytes):
            if whole_chunk:  # without the copies of a script's argument
                stored = self._store_piece(start, b"", [set_chunk(f"{self._prefix}:{chunk}", piece)])
            else:
                stored = self._store_piece(start, memoryview(piece), [])  # type: ignore[arg-type]
        self._refused = stored < 0
        self._stored = max(0, min(stored, start + piece.nbytes))  # less than before if Redis has lost some of it
        return self._stored < whole and not self._refused

    @property
    def travels_with_post(self) -> bool:
        """Whether nothing is stored yet and the payload is small enough for the message that posts it."""
        return self._stored == 0 and self._payload.nbytes <= min(self._speed.piece, blobs.CHUNK)

    def commands_for_post(self) -> list[Command]:
        """The commands that store what is not stored yet, to be sent before the post."""
        if self._payload.nbytes and self.travels_with_post and not self._refused:
            return [set_chunk(f"{self._prefix}:0", self._payload)]
        return []


def set_chunk(key: str, chunk: BlobBuffer) -> Command:
    """Store a whole chunk, which expires unless it is posted."""
    return ("SET", key, memoryview(chunk), "EX", PAYLOAD_SECONDS)  # type: ignore[arg-type]
