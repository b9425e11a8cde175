"""Admission: which updates may be merged. Every rejection names its reason, and the ledger records it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from pydantic import ValidationError

from fedqueue.errors import SignatureError, StoreError, WireError
from fedqueue.protocol.messages import MaskedUpdate, Offer, Update, read
from fedqueue.tensors.blobs import chunks_of
from fedqueue.tensors.codec import Codec
from fedqueue.tensors.frame import Delta, Frame, same_elements
from fedqueue.tensors.manifest import DOUBLES, FLOATS
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
    registered: int | None,
    barrier: bool = False,
    keepers: Sequence[str] = (),
    examples_hidden: bool = False,
) -> Update:
    """Check the header before memory is taken for the payload, and return it; raises Inadmissible.

    `version` is the newest one, `registered` the client's number of examples, None if it is unknown. Behind a
    `barrier`, an update of an earlier round is late. In a run with `keepers` the header is a `MaskedUpdate`. Where
    examples are hidden, registrations and headers say 0.
    """
    try:
        header = read(MaskedUpdate if keepers else Update, arrived.body)
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
    if isinstance(header, MaskedUpdate):
        _admit_seeds(header, keepers)
    if header.examples == 0 and not examples_hidden:
        raise Inadmissible(RejectionReason.NO_EXAMPLES, "an update must be trained on at least one example")
    if registered is not None and header.examples > registered:
        raise Inadmissible(
            RejectionReason.TOO_MANY_EXAMPLES, f"{header.examples} examples, registered are {registered}"
        )
    if barrier:
        admit_to_round(arrived.base, version)
    admit_staleness(arrived.base, version, max_staleness)
    return header


def admit_model(base: int, model: str, published: str) -> None:
    """Raise Inadmissible for an update that was trained from another model than the one `published` as its base.

    Both are digests. A keeper releases updates of one base only if they name the same model, and cannot tell which is
    right.
    """
    if model != published:
        raise Inadmissible(
            RejectionReason.WRONG_BASE, f"trained from model {model[:12]}…, and version {base} is {published[:12]}…"
        )


def admit_offer(arrived: UpdateArrived) -> Offer:
    """Return what the keepers are shown of a masked update; raises Inadmissible for an entry that is no such thing."""
    entry = arrived.entry
    try:
        return Offer(client=entry.client, job=entry.job, attempt=entry.attempt, base=entry.base, header=entry.body)
    except ValidationError as error:
        field = ".".join(map(str, error.errors(include_url=False, include_input=False)[0]["loc"]))
        raise Inadmissible(RejectionReason.MALFORMED, f"its entry has a {field} that no update has") from None


def admit_staleness(base: int, version: int, most: int) -> None:
    """Raise Inadmissible for an update whose base is more than `most` versions old."""
    if version - base > most:
        raise Inadmissible(RejectionReason.STALE, f"staleness {version - base}, at most {most} is merged")


def _admit_seeds(header: MaskedUpdate, keepers: Sequence[str]) -> None:
    """Raise Inadmissible unless the header has one sealed seed for each keeper, in the order of the configuration."""
    found = [(seed.component, seed.keeper) for seed in header.seeds]
    if found != list(enumerate(keepers)):
        names = ", ".join(keeper for _, keeper in found)
        raise Inadmissible(
            RejectionReason.UNMASKABLE, f"its masks are for {names}, and the run's keepers are {', '.join(keepers)}"
        )


def admit_to_round(base: int, version: int) -> None:
    """Raise Inadmissible for an update of an earlier round, which was closed without it."""
    if base < version:
        raise Inadmissible(
            RejectionReason.LATE, f"trained from version {base}, but the round of version {version + 1} is on"
        )


def admit_delta(delta: Delta, model: Frame) -> float:
    """Return the L2 norm of the parameters; raises Inadmissible if the delta cannot be read or is not finite.

    The check is one pass, piece by piece: the norm of a vector is finite exactly if no element is NaN or infinite and
    the squares do not overflow. A delta whose norm exceeds 1e19 is no training result either. A buffer is judged where
    the client changed it: where its bits differ from those of `model`, the newest version.
    """
    try:
        norm = math.hypot(*(float(torch.linalg.vector_norm(values)) for _, values in delta.pieces()))
        if not math.isfinite(norm):
            raise Inadmissible(RejectionReason.NON_FINITE, _bad_parameter(delta))
    except (StoreError, WireError) as error:
        raise Inadmissible(unusable_reason(error), str(error)) from error
    for section in FLOATS, DOUBLES:
        values = getattr(delta, section)
        if len(values) and not math.isfinite(float(torch.linalg.vector_norm(values))):
            _require_finite_changes(section, values, delta, model)
    return norm


def _bad_parameter(delta: Delta) -> str:
    """Describe the first parameter that is not finite."""
    for where, values in delta.pieces():
        bad = torch.nonzero(~torch.isfinite(values)).flatten()
        if len(bad) and isinstance(where, slice):
            return f"{delta.manifest.parameter_at(where.start + int(bad[0])).name} has NaN or infinity"
        if len(bad):  # a sparse encoder sends no finite value after it has found one that is not
            return "the parameters have NaN or infinity"
    return "the norm of the parameters overflows float32"


def _require_finite_changes(section: str, values: torch.Tensor, delta: Delta, model: Frame) -> None:
    judged = ~torch.isfinite(values.square())
    if latest := delta.manifest.latest(section):  # nothing is computed from these values
        changed = delta.changed[latest.flags].bool().repeat_interleave(torch.tensor(latest.lengths))
        judged[latest.elements] = ~torch.isfinite(values[latest.elements]) & changed
    judged &= ~same_elements(values, getattr(model, section))
    if bool(judged.any()):
        name = delta.manifest.buffer_at(section, int(torch.nonzero(judged)[0])).name
        raise Inadmissible(RejectionReason.NON_FINITE, f"the buffer {name} has become NaN, infinite or too large")


def unusable_reason(error: StoreError | WireError) -> RejectionReason:
    """Return the reason for a payload that cannot be read, is not the one that was signed, or is not a frame."""
    if isinstance(error, StoreError):
        return RejectionReason.UNREADABLE
    return RejectionReason.TAMPERED if isinstance(error, SignatureError) else RejectionReason.MALFORMED
