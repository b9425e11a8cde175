"""The msgpack encoding of everything that crosses Redis: plain values, bounded in bytes and in depth."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgpack

from fedqueue.errors import WireError

MAX_MESSAGE = 64 * 1024  # bytes
MAX_RECORD = 16 * 1024 * 1024  # bytes of what only coordinators write: a ledger record, totals, a configuration
MAX_DEPTH = 16  # maps and lists inside each other


def pack(value: Any) -> bytes:
    """The msgpack encoding of a plain value.

    Raises WireError for a type that the protocol does not carry, and for more than MAX_MESSAGE bytes.
    """
    try:
        data: bytes = msgpack.packb(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise WireError(f"cannot be sent: {error}") from error
    if len(data) > MAX_MESSAGE:
        raise WireError(f"message of {len(data)} bytes; at most {MAX_MESSAGE} are allowed")
    return data


def unpack(data: bytes, limit: int = MAX_MESSAGE) -> Any:
    """The inverse of `pack`, for at most `limit` bytes; the value takes at most about 100 times as much memory.

    Raises WireError for extension types, nesting beyond MAX_DEPTH, bad UTF-8 and trailing bytes. A length in a
    header is compared with the bytes that are present before any memory is allocated for it.
    """
    if len(data) > limit:
        raise WireError(f"message of {len(data)} bytes; at most {limit} are allowed")
    try:
        value = msgpack.unpackb(data, ext_hook=_refuse_extension, timestamp=0)
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
        raise WireError(f"not msgpack of this protocol: {type(error).__name__}: {error}") from error
    _require_shallow(value)
    return value


def pack_record(record: Mapping[str, Any]) -> bytes:
    """A map as a coordinator stores it in Redis, of any size.

    Packing is deterministic: unpacking a record and packing it again gives the same bytes.
    """
    data: bytes = msgpack.packb(record)
    return data


def unpack_record(data: bytes) -> dict[str, Any]:
    """The inverse of `pack_record`, for at most MAX_RECORD bytes; raises WireError for anything but a map of names."""
    value = unpack(data, MAX_RECORD)
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise WireError(f"expected a map of names, got {type(value).__name__}")
    return value


def _require_shallow(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return
    raise WireError(f"nested more than {MAX_DEPTH} levels deep")


def _refuse_extension(code: int, data: bytes) -> Any:
    raise ValueError(f"extension type {code} is not part of the protocol")
