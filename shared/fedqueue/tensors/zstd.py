"""Zstandard on top of an encoding: lossless, and smaller where bytes repeat.

    8 bytes, little-endian: length of the whole, including these 8     then one zstd frame that states its size

Numbers of `width` bytes are split first: all their first bytes, then all their second bytes, and so on. The exponents
of weights and deltas are similar, their last bits are not. The length lets a reader request the right size from Redis.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import zstandard

from fedqueue.errors import WireError

Bytes = npt.NDArray[np.uint8]

PREFIX = 8  # bytes
LEVEL = 1  # the remaining gain is entropy coding: higher levels search for repetitions that do not exist
WINDOW = 8 * 1024 * 1024  # bytes of memory that a frame may require; our encoder requires 512 KiB
_HEADER = 18  # bytes of the largest header of a zstd frame


def bound(nbytes: int) -> int:
    """The largest length that `pack` returns for `nbytes` bytes: zstd's ZSTD_COMPRESSBOUND and the prefix."""
    return PREFIX + nbytes + (nbytes >> 8) + 128


def pack(data: Bytes, width: int) -> Bytes:
    """Compress `data`, uint8, whose length is a multiple of `width` bytes."""
    planes = data if width == 1 else np.ascontiguousarray(data.reshape(-1, width).T)
    frame = zstandard.ZstdCompressor(level=LEVEL).compress(_view(planes))
    wire = np.empty(PREFIX + len(frame), np.uint8)
    wire[:PREFIX].view(np.uint64)[0] = len(wire)
    wire[PREFIX:] = np.frombuffer(frame, np.uint8)
    return wire


def length(prefix: bytes) -> int:
    """The length that the first 8 bytes state; 0 if `prefix` is shorter."""
    return int.from_bytes(prefix, "little") if len(prefix) == PREFIX else 0


def unpack(wire: Bytes, nbytes: int, width: int) -> Bytes:
    """The inverse of `pack`, for data of exactly `nbytes` bytes; it allocates at most twice that many.

    Raises WireError for anything else.
    """
    frame = _view(wire[PREFIX:])
    try:
        header = zstandard.get_frame_parameters(frame[:_HEADER])
        if length(wire[:PREFIX].tobytes()) != len(wire) or header.content_size != nbytes or header.dict_id:
            raise WireError(f"zstd: {len(wire)} bytes for {header.content_size}, expected {nbytes}")
        planes = np.empty(nbytes, np.uint8)
        target, filled = _view(planes), 0
        with zstandard.ZstdDecompressor(max_window_size=WINDOW).stream_reader(frame) as reader:
            while filled < nbytes and (got := reader.readinto(target[filled:])):
                filled += got
            if filled != nbytes or reader.read(1):
                raise WireError(f"zstd: decompresses to {filled} bytes or more, expected {nbytes}")
    except zstandard.ZstdError as error:
        raise WireError(f"zstd: {error}") from error
    if width == 1:
        return planes
    return np.ascontiguousarray(planes.reshape(width, -1).T).reshape(-1)


def _view(data: Bytes) -> memoryview:
    return data.reshape(-1).data
