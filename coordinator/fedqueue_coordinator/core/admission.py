"""What may be merged, and why not. A rejection names its reason; nothing is dropped in silence."""

from __future__ import annotations

import math

import torch

from fedqueue.errors import SignatureError, StoreError, WireError
from fedqueue.protocol.messages import Update, read
from fedqueue.tensors.codec import Codec
from fedqueue.tensors.frame import Delta
from fedqueue.transport.store import chunks_of
from fedqueue_coordinator.core.events import UpdateArrived

MALFORMED = "malformed"  # the header is not one of this protocol
UNKNOWN_JOB = "unknown_job"  # no open job of that name and client
WRONG_BASE = "wrong_base"  # a base version that the job cannot have trained from
WRONG_ENCODING = "wrong_encoding"  # not the one of the run's [compression]
WRONG_SIZE = "wrong_size"  # the payload is not one frame of the run's manifest
NO_EXAMPLES = "no_examples"  # it says that it was trained on nothing
TOO_MANY_EXAMPLES = "too_many_examples"  # more than its client registered
LATE = "late"  # its round was closed before it came
STALE = "stale"  # more versions behind than aggregation.max_staleness
NON_FINITE = "non_finite"  # NaN or infinity in the payload
UNREADABLE = "unreadable"  # the payload is not, or not wholly, in the store
NORM = "too_large"  # the delta is larger than [admission] allows
FORGED = "forged"  # its signature is missing or does not hold
FOREIGN = "foreign"  # its client is not enrolled, or was revoked
SUPERSEDED = "superseded"  # said by a worker process that another one of its client has followed
TAMPERED = "tampered"  # the payload is not the one that was signed
RUN_ENDED = "run_ended"  # it came too late to be part of a version

NO_FAULT = frozenset({STALE, LATE, RUN_ENDED})
"""Being slow is no fault of the client's: it trains on at once."""
NOT_ITS_OWN = frozenset({FORGED, FOREIGN, TAMPERED})
"""What anybody who writes to Redis could have done in the client's name: it rests, and is not set aside for it."""


class Inadmissible(Exception):  # a verdict, caught where it is raised
    """Not to be merged: `reason` is one of the above, `detail` says what was expected."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


def admit_header(
    event: UpdateArrived,
    codec: Codec,
    version: int,
    max_staleness: int,
    registered: int,
    barrier: bool = False,
) -> Update:
    """The header, checked before any memory is taken for its payload; raises Inadmissible.

    Behind a `barrier` an update is of the present round, which began at `version`, or late.
    """
    try:
        update = read(Update, event.body)
    except WireError as error:
        raise Inadmissible(MALFORMED, str(error)) from error
    if not 0 <= event.base <= version:
        raise Inadmissible(WRONG_BASE, f"base version {event.base}, the newest is {version}")
    if update.encoding != codec.name:
        raise Inadmissible(WRONG_ENCODING, f"encoded as {update.encoding}, expected {codec.name}")
    if not codec.accepts(update.nbytes) or update.chunks != chunks_of(update.nbytes):
        most = f"{'at most ' if codec.zstd else ''}{codec.largest}"
        raise Inadmissible(WRONG_SIZE, f"{update.nbytes} bytes in {update.chunks} chunks, expected {most}")
    if update.examples == 0:
        raise Inadmissible(NO_EXAMPLES, "an update must be trained on at least one example")
    if update.examples > registered:
        raise Inadmissible(TOO_MANY_EXAMPLES, f"{update.examples} examples, registered are {registered}")
    if barrier:
        admit_to_round(event.base, version)
    if version - event.base > max_staleness:
        raise Inadmissible(STALE, f"staleness {version - event.base}, at most {max_staleness} is merged")
    return update


def admit_to_round(base: int, version: int) -> None:
    """Raise Inadmissible for an update of an earlier round, which has closed without it."""
    if base < version:
        raise Inadmissible(LATE, f"trained from version {base}, but the round of version {version + 1} is on")


def admit_frame(frame: Delta) -> float:
    """The L2 norm of the parameters' delta; raises Inadmissible unless all of it can be read and is finite.

    One pass, piece by piece: the norm of a vector is finite exactly where no element is NaN or infinite and
    its squares do not overflow, and a delta whose norm exceeds 1e19 is no training result either.
    """
    try:
        norm = math.hypot(*(float(torch.linalg.vector_norm(values)) for _, values in frame.pieces()))
    except (StoreError, WireError) as error:
        raise Inadmissible(unusable_reason(error), str(error)) from error
    buffers = float(torch.linalg.vector_norm(frame.buffers)) if len(frame.buffers) else 0.0
    if not (math.isfinite(norm) and math.isfinite(buffers)):
        raise Inadmissible(NON_FINITE, "the payload holds NaN, infinity, or values whose norm overflows float32")
    return norm


def unusable_reason(error: StoreError | WireError) -> str:
    """The reason for which a payload is rejected that cannot be read, is not what was signed, or is no frame."""
    if isinstance(error, StoreError):
        return UNREADABLE
    return TAMPERED if isinstance(error, SignatureError) else MALFORMED
