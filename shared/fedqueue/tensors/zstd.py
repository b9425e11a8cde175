"""Zstandard on top of an encoding: fewer bytes where they repeat, and the same bits again.

    8 bytes, little-endian: length of the whole, these 8 included     then one zstd frame that states its size

Numbers of `width` bytes are taken apart first, all their first bytes, then all their second ones: the exponents of
weights or deltas are alike, their last bits are not. The length lets a reader ask Redis for no more than there is.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import zstandard

from fedqueue.errors import WireError

Bytes = npt.NDArray[np.uint8]

PREFIX = 8  # bytes
LEVEL = 1  # the rest of what there is to save is entropy: higher levels search for repetitions that are not there
WINDOW = 8 * 1024 * 1024  # bytes of memory that a frame may ask for; ours ask for 512 KiB
_HEADER = 18  # bytes, at most, of a zstd frame


def bound(nbytes: int) -> int:
    """The greatest length of `pack` for that many bytes, as zstd's own ZSTD_COMPRESSBOUND."""
    return PREFIX + nbytes + (nbytes >> 8) + 128


def pack(data: Bytes, width: int) -> Bytes:
    """`data`, uint8, in a multiple of `width` bytes."""
    planes = data if width == 1 else np.ascontiguousarray(data.reshape(-1, width).T)
    frame = zstandard.ZstdCompressor(level=LEVEL).compress(_view(planes))
    wire = np.empty(PREFIX + len(frame), np.uint8)
    wire[:PREFIX].view(np.uint64)[0] = len(wire)
    wire[PREFIX:] = np.frombuffer(frame, np.uint8)
    return wire


def length(prefix: bytes) -> int:
    """What the first 8 bytes say of the length; 0 where they are fewer."""
    return int.from_bytes(prefix, "little") if len(prefix) == PREFIX else 0


def unpack(wire: Bytes, nbytes: int, width: int) -> Bytes:
    """The inverse of `pack`, for data of exactly `nbytes` bytes: no more memory is taken than for twice those.

    Raises WireError for anything else.
    """
    frame = _view(wire[PREFIX:])
    try:
        header = zstandard.get_frame_parameters(frame[:_HEADER])
        if length(wire[:PREFIX].tobytes()) != len(wire) or header.content_size != nbytes or header.dict_id:
            raise WireError(f"zstd: {len(wire)} bytes for {header.content_size}, expected {nbytes}")
        planes = np.empty(nbytes, np.uint8)
        place, filled = _view(planes), 0
        with zstandard.ZstdDecompressor(max_window_size=WINDOW).stream_reader(frame) as reader:
            while filled < nbytes and (got := reader.readinto(place[filled:])):
                filled += got
            if filled != nbytes or reader.read(1):
                raise WireError(f"zstd: {filled} bytes or more came out, expected {nbytes}")
    except zstandard.ZstdError as error:
        raise WireError(f"zstd: {error}") from error
    if width == 1:
        return planes
    return np.ascontiguousarray(planes.reshape(width, -1).T).reshape(-1)


def _view(data: Bytes) -> memoryview:
    return data.reshape(-1).data
