"""Blobs in Redis: chunks of at most `CHUNK` bytes at the keys `PREFIX:0`, `PREFIX:1`, …"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import redis

from fedqueue.errors import BlobMissing, StoreError
from fedqueue.tensors import blobs
from fedqueue.tensors.blobs import BlobBuffer, chunks_of
from fedqueue.transport.zero_copy import Answer, Command, Moved, Part, get_parts, ignore_moved

if TYPE_CHECKING:  # torch and numpy, which a command that only shows a run does without
    from fedqueue.tensors.codec import Codec

READ = 4 * 1024 * 1024  # bytes per read of a part of a chunk: the server keeps a second copy of that many


class BlobStore:
    """Mixin for a store with a client `redis`."""

    redis: redis.Redis

    def write_blob(self, prefix: str, buffer: BlobBuffer, seconds: int | None = None) -> int:
        """Store `buffer` in chunks that expire after `seconds`, or never; returns the number of chunks."""
        chunks, size = chunks_of(buffer.nbytes), blobs.CHUNK
        for i in range(chunks):
            self.redis.set(f"{prefix}:{i}", memoryview(buffer[i * size : (i + 1) * size]), ex=seconds)  # type: ignore[arg-type]
        return chunks

    def begin_blob(self, prefix: str, buffer: BlobBuffer, seconds: int) -> list[Command]:
        """Store a blob of several chunks at once; for a blob of one chunk, return the command that stores it.

        That command can travel with the script that needs the blob. The chunks expire after `seconds`.
        """
        if chunks_of(buffer.nbytes) > 1:
            self.write_blob(prefix, buffer, seconds)
            return []
        return [("SET", f"{prefix}:0", memoryview(buffer), "EX", seconds)] if buffer.nbytes else []  # type: ignore[arg-type]

    def read_blob(self, prefix: str, into: BlobBuffer) -> None:
        """Fill `into` from the chunks at `prefix`.

        Raises BlobMissing for a missing chunk, and StoreError for a chunk of the wrong size.
        """
        self.read_span(prefix, 0, into, into.nbytes)

    def read_span(self, prefix: str, start: int, into: BlobBuffer, whole: int, moved: Moved = ignore_moved) -> None:
        """Fill `into` from byte `start` on of a blob of `whole` bytes; raises as `read_blob`."""
        done = 0
        while done < into.nbytes:
            number, offset = divmod(start + done, blobs.CHUNK)
            target = into[done : done + min(READ, blobs.CHUNK - offset)]
            chunk = min(blobs.CHUNK, whole - number * blobs.CHUNK)
            part = part_of_chunk(f"{prefix}:{number}", offset, target, chunk)
            require_part(part, get_parts(self.redis, [part], moved)[0], chunk)
            done += target.nbytes

    def blob_size(self, prefix: str, codec: Codec) -> int:
        """The size in bytes of a frame stored at `prefix`; a frame under zstd states its own size.

        Raises BlobMissing if there is no such blob, and StoreError for a stated size that no frame has.
        """
        if not codec.zstd:
            return codec.nbytes
        from fedqueue.tensors.zstd import PREFIX, length

        claimed = length(cast(bytes, self.redis.getrange(f"{prefix}:0", 0, PREFIX - 1)))
        if not claimed:
            raise BlobMissing(f"{prefix}:0")
        if not codec.accepts(claimed):
            raise StoreError(f"{prefix} claims {claimed} bytes, at most {codec.largest} are possible")
        return claimed


def part_of_chunk(key: str, start: int, target: BlobBuffer, chunk: int) -> Part:
    """The part that fills `target` from byte `start` of a chunk of `chunk` bytes.

    At the end of the chunk it asks for one byte more, which reveals a chunk that is too large.
    """
    end = start + target.nbytes
    return Part(key, start, end - (end < chunk), memoryview(target))  # type: ignore[arg-type]


def require_part(part: Part, got: Answer, chunk: int) -> None:
    """Check the reply to a part of a chunk of `chunk` bytes.

    Raises BlobMissing for a missing chunk, and StoreError for a chunk of the wrong size.
    """
    if got is None:
        return
    if not got and not part.start:
        raise BlobMissing(part.key)
    more = " or more" if part.into is not None and len(got) > part.into.nbytes else ""
    raise StoreError(f"{part.key} has {part.start + len(got)}{more} bytes, expected {chunk}")
