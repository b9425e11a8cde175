"""What a keeper does in Redis: publish its encryption key, read what it is asked, store masks, and answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from fedqueue.protocol.messages import MAX_OPENED, Masked
from fedqueue.protocol.signed_envelope import new_digest
from fedqueue.secure.keeper import Release
from fedqueue.tensors import blobs
from fedqueue.tensors.blobs import BlobBuffer
from fedqueue.transport.store import Store

FIRST = "0-0"  # before the first entry of a stream
ASKS_AT_ONCE = MAX_OPENED  # entries in one read, so that one answer has room for all of its offers
MASK_SECONDS = 24 * 3600  # after which a mask that no version was made with is deleted; the keeper can make it again


@dataclass(frozen=True)
class Ask:
    """An entry of the stream of asks."""

    id: str
    kind: str
    body: bytes


@dataclass(frozen=True)
class Glance:
    """What changes in a run: whether it runs, why it ended, and its signed description."""

    state: str
    stopped_because: str
    descriptor: bytes


class KeeperStore(Store):
    """A keeper's view of the run; its Redis user needs no other commands than those here and in `info`."""

    def glance(self) -> Glance | None:
        """What the keeper follows of the run, without its configuration and manifest; None if there is no such run."""
        fields = ["state", "stopped_because", "descriptor"]
        state, because, descriptor = cast("list[bytes | None]", self.redis.hmget(self.keys.config, fields))
        return None if state is None else Glance(state.decode(), (because or b"").decode(), descriptor or b"")

    def published_key(self, keeper: str) -> bytes:
        """The signed statement of the keeper's encryption key as stored; empty without any."""
        return cast("bytes | None", self.redis.get(self.keys.keeper(keeper))) or b""

    def publish_key(self, keeper: str, statement: bytes) -> None:
        """Store the signed statement of the keeper's encryption key."""
        self.redis.set(self.keys.keeper(keeper), statement)

    def asks(self, keeper: str, after: str, block_seconds: float) -> list[Ask]:
        """The next asks after the entry `after`; waits for the first one for at most `block_seconds`, if at all."""
        block = max(1, round(block_seconds * 1000)) if block_seconds else None
        raw: Any = self.redis.xread({self.keys.asks(keeper): after}, count=ASKS_AT_ONCE, block=block)
        if isinstance(raw, dict):  # RESP3
            raw = [(stream, entries[0] if entries else []) for stream, entries in raw.items()]
        return [
            Ask(entry.decode(), fields.get(b"kind", b"")[:20].decode(errors="replace"), fields.get(b"body", b""))
            for _, entries in raw or ()
            for entry, fields in entries
        ]

    def store_mask(self, keeper: str, release: Release) -> Masked:
        """Store the sum of a cohort's masks; returns the answer that describes it. Repeating it stores the same."""
        prefix, digest, number = self.keys.mask(release.cohort, keeper), new_digest(), 0
        for chunk in _chunks(release):
            digest.update(memoryview(chunk))  # type: ignore[arg-type]
            self.redis.set(f"{prefix}:{number}", memoryview(chunk), ex=MASK_SECONDS)  # type: ignore[arg-type]
            number += 1
        return Masked(cohort=release.cohort, digest=digest.hexdigest(), nbytes=release.nbytes, chunks=number)

    def say(self, keeper: str, answers: Sequence[tuple[str, bytes]]) -> None:
        """Append answers, each a kind and a signed body, in one round trip, and wake the coordinator."""
        stream = self.keys.says(keeper)
        pipe = self.redis.pipeline(transaction=False)
        for kind, body in answers:
            pipe.xadd(stream, {"kind": kind, "body": body})
        pipe.publish(self.keys.wakeup, stream)
        pipe.execute()


def _chunks(release: Release) -> Iterator[BlobBuffer]:
    """The bytes of a release in chunks of a blob; a chunk is valid until the next one."""
    chunk, filled = np.empty(min(release.nbytes, blobs.CHUNK), np.uint8), 0
    for piece in release.pieces():
        data = piece.view(np.uint8)
        while len(data):
            part = data[: len(chunk) - filled]
            chunk[filled : filled + len(part)] = part
            filled, data = filled + len(part), data[len(part) :]
            if filled == len(chunk):
                yield chunk
                filled = 0
    if filled:
        yield chunk[:filled]
