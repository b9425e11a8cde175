"""Admission: which updates may be merged. Every rejection names its reason, and the ledger records it."""

from __future__ import annotations

import math

import torch

from fedqueue.errors import SignatureError, StoreError, WireError
from fedqueue.protocol.messages import Update, read
from fedqueue.tensors.blobs import chunks_of
from fedqueue.tensors.codec import Codec
from fedqueue.tensors.frame import Delta
from fedqueue_coordinator.core.events import UpdateArrived
from fedqueue_coordinator.core.reasons import RejectionReason


class Inadmissible(Exception):  # a verdict, which `Federation` catches
    """The verdict that an update must not be merged; `detail` states what was expected."""

    def __init__(self, reason: RejectionReason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


def admit_header(
    arrived: UpdateArrived,
    codec: Codec,
    version: int,
    max_staleness: int,
    registered: int,
    barrier: bool = False,
) -> Update:
    """Check the header before memory is taken for the payload, and return it; raises Inadmissible.

    `version` is the newest one, `registered` the client's number of examples. Behind a `barrier`, an update of an
    earlier round is late.
    """
    try:
        header = read(Update, arrived.body)
    except WireError as error:
        raise Inadmissible(RejectionReason.MALFORMED, str(error)) from error
    if not 0 <= arrived.base <= version:
        raise Inadmissible(RejectionReason.WRONG_BASE, f"base version {arrived.base}, the newest is {version}")
    if header.encoding != codec.name:
        raise Inadmissible(RejectionReason.WRONG_ENCODING, f"encoded as {header.encoding}, expected {codec.name}")
    if not codec.accepts(header.nbytes) or header.chunks != chunks_of(header.nbytes):
        most = f"{'at most ' if codec.zstd else ''}{codec.largest}"
        raise Inadmissible(
            RejectionReason.WRONG_SIZE, f"{header.nbytes} bytes in {header.chunks} chunks, expected {most}"
        )
    if header.examples == 0:
        raise Inadmissible(RejectionReason.NO_EXAMPLES, "an update must be trained on at least one example")
    if header.examples > registered:
        raise Inadmissible(
            RejectionReason.TOO_MANY_EXAMPLES, f"{header.examples} examples, registered are {registered}"
        )
    if barrier:
        admit_to_round(arrived.base, version)
    if version - arrived.base > max_staleness:
        raise Inadmissible(
            RejectionReason.STALE, f"staleness {version - arrived.base}, at most {max_staleness} is merged"
        )
    return header


def admit_to_round(base: int, version: int) -> None:
    """Raise Inadmissible for an update of an earlier round, which was closed without it."""
    if base < version:
        raise Inadmissible(
            RejectionReason.LATE, f"trained from version {base}, but the round of version {version + 1} is on"
        )


def admit_delta(delta: Delta) -> float:
    """Return the L2 norm of the parameters; raises Inadmissible if the delta cannot be read or is not finite.

    The check is one pass, piece by piece: the norm of a vector is finite exactly if no element is NaN or infinite and
    the squares do not overflow. A delta whose norm exceeds 1e19 is no training result either.
    """
    try:
        norm = math.hypot(*(float(torch.linalg.vector_norm(values)) for _, values in delta.pieces()))
    except (StoreError, WireError) as error:
        raise Inadmissible(unusable_reason(error), str(error)) from error
    buffers = float(torch.linalg.vector_norm(delta.buffers)) if len(delta.buffers) else 0.0
    if not (math.isfinite(norm) and math.isfinite(buffers)):
        raise Inadmissible(
            RejectionReason.NON_FINITE, "the payload holds NaN, infinity, or values whose norm overflows float32"
        )
    return norm


def unusable_reason(error: StoreError | WireError) -> RejectionReason:
    """Return the reason for a payload that cannot be read, is not the one that was signed, or is not a frame."""
    if isinstance(error, StoreError):
        return RejectionReason.UNREADABLE
    return RejectionReason.TAMPERED if isinstance(error, SignatureError) else RejectionReason.MALFORMED
