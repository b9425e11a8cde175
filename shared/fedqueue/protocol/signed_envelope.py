"""Signed envelopes: the bytes of a message with an Ed25519 signature.

A signature covers more than the message. It also covers the kind of message, the run, its instance and epoch, and
what the message is about (client, job, attempt, base version, …), so that a message cannot be replayed in another
context. The envelope does not contain this context: the reader states the context that it expects.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias, cast

import msgpack
from pydantic import Field

from fedqueue.errors import SignatureError, WireError
from fedqueue.protocol.messages import Digest, Message, Natural, read

if TYPE_CHECKING:  # a command that only shows a run imports neither numpy nor cryptography
    import numpy as np
    import numpy.typing as npt

    from fedqueue.protocol.key_files import PublicKey, SigningKey

Digestible: TypeAlias = "bytes | npt.NDArray[np.uint8]"
"""What is hashed without a copy: bytes, or a contiguous uint8 array."""

DOMAIN = "fedqueue/1"  # separates these signatures from other uses of a key, and from other protocol versions

RUN_DESCRIPTOR, ORDER, VERSION, EVALUATED = "descriptor", "order", "version", "evaluated"  # signed by a coordinator
COHORT = "cohort"  # signed by a coordinator
UPDATE, ENDED, JOINED, LEFT = "update", "ended", "joined", "left"  # signed by a worker
UNAVAILABLE = "unavailable"  # signed by a worker
QUESTION, ANSWER = "question", "answer"  # signed by a coordinator, and by a worker, before a run begins
KEEPER, OPENED, MASKED, MASK_REFUSED = "keeper", "opened", "masked", "mask_refused"  # signed by a keeper


@dataclass(frozen=True)
class Scope:
    """The run, instance and epoch for which a signature is valid.

    `instance` is random, and new each time a run starts or restarts from a checkpoint.
    """

    run: str
    instance: str = ""
    epoch: int = 0


class SignedEnvelope(Message):
    """A message, the id of the signer's key and the signature; `session` names the worker process that signed."""

    body: Annotated[bytes, Field(max_length=64 * 1024)]
    key: Annotated[str, Field(max_length=16)]
    session: Annotated[str, Field(max_length=64)] = ""
    signature: Annotated[bytes, Field(max_length=64)]


class RunDescriptor(Message):
    """The coordinator's signed description of a run; workers trust no other source of configuration and manifest.

    `term` rises with each coordinator that becomes leader, and `first_version` is the version that its term starts
    from. `config` and `manifest` are digests, and so is `frozen`, of the frozen tensors; it is empty without any.
    """

    instance: Annotated[str, Field(min_length=16, max_length=64)]
    epoch: Natural
    term: Natural
    first_version: Natural
    config: Digest
    manifest: Digest
    frozen: Digest | Literal[""] = ""


class VersionRecord(Message):
    """The coordinator's signed description of a version.

    `model` and `state` are digests of the encoded model and of the server optimizer's state. `job_number` is the last
    job number in use. `history` is the ledger's hash chain up to this version (`ledger_chain.py`), and `totals` the
    digest of the counters that are committed with it.
    """

    model: Digest
    state: Digest
    job_number: Natural
    history: Digest
    totals: Digest


new_digest = hashlib.sha256
"""Incremental form of `digest_of`, for bytes that arrive in pieces."""


def digest_of(data: Digestible) -> str:
    """SHA-256, in hex: the fastest digest of `hashlib` on processors with instructions for it."""
    return new_digest(cast(Any, data)).hexdigest()


def sign_envelope(
    key: SigningKey, kind: str, scope: Scope, about: Sequence[str | int], body: bytes, session: str = ""
) -> bytes:
    """The packed envelope of `body`; raises WireError if it is too large to be sent."""
    signature = key.sign(_statement(kind, scope, about, session, body))
    return SignedEnvelope(body=body, key=key.public.id, session=session, signature=signature).pack()


def open_envelope(
    data: bytes, keys: Iterable[PublicKey], kind: str, scope: Scope, about: Sequence[str | int], who: str
) -> SignedEnvelope:
    """The envelope in `data`, if one of `keys` signed it for exactly this kind, scope and subject.

    Raises SignatureError, which names the expected signer `who`.
    """
    try:
        envelope = read(SignedEnvelope, data)
    except WireError:
        raise SignatureError(f"{kind} is not signed; {who} must sign it") from None
    matching = [key for key in keys if key.id == envelope.key]
    if not matching:
        raise SignatureError(f"{kind} is signed with key {envelope.key!r}, which is not a key of {who}")
    statement = _statement(kind, scope, about, envelope.session, envelope.body)
    if not any(key.verifies(envelope.signature, statement) for key in matching):
        raise SignatureError(f"{kind} was changed, or was signed by {who} in another context: the signature is invalid")
    return envelope


def unverified_body(data: bytes) -> bytes:
    """The body of an envelope without verification, or `data` if it is no envelope: to show, not to act on."""
    try:
        return read(SignedEnvelope, data).body
    except WireError:
        return data


def _statement(kind: str, scope: Scope, about: Sequence[str | int], session: str, body: bytes) -> bytes:
    fields: list[Any] = [DOMAIN, kind, scope.run, scope.instance, scope.epoch, list(about), session, body]
    statement: bytes = msgpack.packb(fields)  # different lists of texts, numbers and bytes pack to different bytes
    return statement
