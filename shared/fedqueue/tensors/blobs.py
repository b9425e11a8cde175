"""Blobs: byte buffers that are stored in chunks of `CHUNK` bytes, so that no value comes near Redis's 512 MB limit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:  # numpy, which a command that only shows a run does without
    import numpy as np
    import numpy.typing as npt

CHUNK = 32 * 1024 * 1024  # bytes
BlobBuffer: TypeAlias = "npt.NDArray[np.uint8]"
"""The bytes of a blob: uint8, contiguous."""


def chunks_of(nbytes: int) -> int:
    """Number of chunks in a blob of `nbytes` bytes."""
    return -(-nbytes // CHUNK)


def slices(length: int, piece: int) -> Iterator[slice]:
    """Slices of at most `piece` elements that cover a vector of `length` elements."""
    return (slice(start, min(start + piece, length)) for start in range(0, length, piece))
