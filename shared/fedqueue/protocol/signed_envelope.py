"""What is signed, and how it travels: a `Seal` around the bytes of a message.

A signature covers more than the message. It covers the kind of message, the run, its instance and epoch, and what the
message is about (client, job, attempt, base version, …), so that nothing that was said once can be passed off as
something said elsewhere. Those are not in the seal: whoever opens it states what it has to be about.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, cast

import msgpack
from pydantic import Field

from fedqueue.errors import SignatureError, WireError
from fedqueue.protocol.messages import Digest, Message, Natural, read

if TYPE_CHECKING:  # what only shows a run takes neither numpy nor cryptography
    import numpy as np
    import numpy.typing as npt

    from fedqueue.protocol.key_files import PublicKey, SigningKey

DOMAIN = "fedqueue/1"  # nothing signed for another purpose, or another version of the protocol, counts here

RUN_DESCRIPTOR, ORDER, VERSION, EVALUATED = "descriptor", "order", "version", "evaluated"  # what a coordinator says
UPDATE, ENDED, JOINED, LEFT = "update", "ended", "joined", "left"  # what a worker says


@dataclass(frozen=True)
class Scope:
    """Where a statement counts. `instance` is drawn anew each time a run is begun, or begun again from a checkpoint."""

    run: str
    instance: str = ""
    epoch: int = 0


class SignedEnvelope(Message):
    """A message with the signature over it. `session` names the worker process that speaks."""

    body: Annotated[bytes, Field(max_length=64 * 1024)]
    key: Annotated[str, Field(max_length=16)]
    session: Annotated[str, Field(max_length=64)] = ""
    signature: Annotated[bytes, Field(max_length=64)]


class RunDescriptor(Message):
    """What a run is, as its coordinator says: workers take neither configuration nor manifest from anything else.

    `term` rises with each coordinator that comes to lead; `floor` is the version from which it went on.
    """

    instance: Annotated[str, Field(min_length=16, max_length=64)]
    epoch: Natural
    term: Natural
    floor: Natural
    config: Digest
    manifest: Digest


class VersionRecord(Message):
    """What a version is: digests of its model and of the server optimizer's state, and the jobs given out so far.

    And how it came about: `history` is of the ledger's versions up to it, `totals` of what is counted with it.
    """

    model: Digest
    state: Digest
    job_number: Natural
    history: Digest
    totals: Digest


new_digest = hashlib.sha256
"""What `digest_of` says, for bytes that come piece by piece."""


def digest_of(data: bytes | npt.NDArray[np.uint8]) -> str:
    """SHA-256, in hex: of what `hashlib` offers the fastest on processors with instructions for it."""
    return new_digest(cast(Any, data)).hexdigest()


NO_HISTORY = hashlib.sha256(b"").hexdigest()


def longer_history(history: str, record: bytes) -> str:
    """The digest of a chain of records that had `history` before this one, which is `packed`."""
    return hashlib.sha256(history.encode() + record).hexdigest()


def history_of(ledger: Iterable[Mapping[str, Any]]) -> str:
    """The digest of the records of versions in a ledger, in order."""
    history = NO_HISTORY
    for record in ledger:
        if record["kind"] == "version":
            history = longer_history(history, packed(record))
    return history


def packed(record: Mapping[str, Any]) -> bytes:
    """A map as it lies in Redis: packed, unpacked and packed again it is the same bytes."""
    data: bytes = msgpack.packb(record)
    return data


def sign_envelope(
    key: SigningKey, kind: str, scope: Scope, about: Sequence[str | int], body: bytes, session: str = ""
) -> bytes:
    """The packed Seal of `body`; raises WireError where it is too large to be sent."""
    signature = key.sign(_statement(kind, scope, about, session, body))
    return SignedEnvelope(body=body, key=key.public.id, session=session, signature=signature).pack()


def open_envelope(
    data: bytes, keys: Iterable[PublicKey], kind: str, scope: Scope, about: Sequence[str | int], who: str
) -> SignedEnvelope:
    """The Seal in `data`, signed by one of `keys` and about exactly this; raises SignatureError, which names `who`."""
    try:
        envelope = read(SignedEnvelope, data)
    except WireError:
        raise SignatureError(f"{kind} is not signed, {who} has to sign it") from None
    matching = [key for key in keys if key.id == envelope.key]
    if not matching:
        raise SignatureError(f"{kind} is signed with key {envelope.key!r}, which is none of {who}'s")
    statement = _statement(kind, scope, about, envelope.session, envelope.body)
    if not any(key.holds(envelope.signature, statement) for key in matching):
        raise SignatureError(f"{kind} was changed, or was signed by {who} for something else: the signature fails")
    return envelope


def unverified_body(data: bytes) -> bytes:
    """The body of a Seal whose signature nobody has looked at, or `data` where it is none: to show, not to act upon."""
    try:
        return read(SignedEnvelope, data).body
    except WireError:
        return data


def _statement(kind: str, scope: Scope, about: Sequence[str | int], session: str, body: bytes) -> bytes:
    fields: list[Any] = [DOMAIN, kind, scope.run, scope.instance, scope.epoch, list(about), session, body]
    statement: bytes = msgpack.packb(fields)  # of two different lists of texts, numbers and bytes never the same
    return statement
