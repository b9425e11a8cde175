"""Verifies a stream entry's signature and converts the entry to an event.

Any Redis writer can append entries in a client's name. So an invalid signature never penalizes the client it names: its
job ends and the client pauses, but the fault does not count towards setting it aside.
"""

from __future__ import annotations

from collections.abc import Mapping

import structlog

from fedqueue.errors import NotEnrolled, SignatureError, Superseded, WireError
from fedqueue.protocol.coordinator_identity import CoordinatorIdentity
from fedqueue.protocol.messages import Ending, Evaluation, Registration, Unavailable, read
from fedqueue.protocol.signed_envelope import ENDED, JOINED, LEFT, UNAVAILABLE, UPDATE, SignedEnvelope
from fedqueue.protocol.stream_entry import StreamEntry
from fedqueue_coordinator.core.events import (
    ClientJoined,
    ClientLeft,
    ClientUnavailable,
    Evaluated,
    Event,
    InvalidEntry,
    JobEnded,
    UpdateArrived,
)
from fedqueue_coordinator.core.reasons import AbandonReason, RejectionReason

log = structlog.get_logger("fedqueue.coordinator")


class EntryVerifier:
    """Verifies against the clients that `identity` has enrolled; without an identity, every entry is valid."""

    def __init__(self, identity: CoordinatorIdentity | None) -> None:
        self._identity = identity
        self._session: dict[str, str] = {}  # client → the worker process that registered it last
        self._former: set[tuple[str, str]] = set()  # (client, worker process) that another process has replaced

    def to_event(self, entry: StreamEntry) -> Event:
        """Return the event of an entry; `InvalidEntry` if it is no valid message.

        An update or an ending with an invalid signature is an event of its job nevertheless, because the store took the
        entry for the job's end.
        """
        try:
            return self._to_event(entry)
        except WireError as error:
            return InvalidEntry(entry, RejectionReason(_reason_of(error)), str(error))

    def _to_event(self, entry: StreamEntry) -> Event:
        match entry.kind:
            case "update":
                return self._update(entry)
            case "ended":
                return self._ending(entry)
            case "joined":
                registration = self.registration(entry.client, entry.body)
                return ClientJoined(registration.client, registration.examples)
            case "left":
                self._check_leaving(entry)
                return ClientLeft(entry.client)
            case "unavailable":
                return ClientUnavailable(entry.id, entry.client, self._unavailable(entry).error)
            case "evaluated":
                body = self._identity.open_evaluation(entry.body) if self._identity else entry.body
                result = read(Evaluation, body)
                return Evaluated(result.version, result.metrics, result.error)
        raise WireError(f"entry of kind {entry.kind!r}")

    def registration(self, client: str, data: bytes) -> Registration:
        """Verify a client's registration, from its stream or from its record; raises WireError.

        A registration that is signed by a former worker process of the client is a replay, and raises Superseded.
        """
        if self._identity is None:
            registration = read(Registration, data)
            if registration.client != client:
                raise WireError(f"registration of {registration.client} by {client}")
            return registration
        envelope = self._identity.open(JOINED, client, [], data)
        registration = read(Registration, envelope.body)
        if registration.client != client:
            raise SignatureError(f"client {client} signed a registration of {registration.client}")
        if (client, envelope.session) in self._former:
            raise Superseded(
                f"a registration of client {client} was replayed: another worker has registered the client since"
            )
        present = self._session.get(client)
        if present is not None and present != envelope.session:
            self._former.add((client, present))
        self._session[client] = envelope.session
        return registration

    def valid_registrations(self, signed: Mapping[str, bytes]) -> dict[str, int | None]:
        """Return client → examples for each valid registration in `signed` (client → registration); log the others."""
        examples: dict[str, int | None] = {}
        for client, data in signed.items():
            try:
                examples[client] = self.registration(client, data).examples
            except WireError as error:
                log.warning(
                    "ignoring invalid registration; check the keys of the site", client=client, error=str(error)
                )
        return examples

    def trusts(self, client: str) -> bool:
        """Whether the client is still enrolled; a revocation takes effect during a run."""
        return self._identity is None or self._identity.is_enrolled(client)

    def _update(self, entry: StreamEntry) -> UpdateArrived:
        try:
            return UpdateArrived(entry, self._verified_body(UPDATE, entry))
        except SignatureError as error:
            return UpdateArrived(entry, entry.body, (RejectionReason(_reason_of(error)), str(error)))

    def _ending(self, entry: StreamEntry) -> JobEnded:
        try:
            ending = read(Ending, self._verified_body(ENDED, entry))
        except SignatureError as error:
            return JobEnded(entry.id, entry.job, entry.client, AbandonReason(_reason_of(error)), str(error))
        return JobEnded(entry.id, entry.job, entry.client, AbandonReason(ending.reason), ending.error, ending.final)

    def _unavailable(self, entry: StreamEntry) -> Unavailable:
        body = entry.body
        if self._identity is not None:
            envelope = self._identity.open(UNAVAILABLE, entry.client, [], body)
            if (entry.client, envelope.session) in self._former:
                raise Superseded(f"client {entry.client} is served by another worker than the one that cannot load it")
            body = envelope.body
        unavailable = read(Unavailable, body)
        if unavailable.client != entry.client:
            raise WireError(f"report that client {unavailable.client} is unavailable, by {entry.client}")
        return unavailable

    def _verified_body(self, kind: str, entry: StreamEntry) -> bytes:
        if self._identity is None:
            return entry.body
        return self._identity.open(kind, entry.client, [entry.job, entry.attempt, entry.base], entry.body).body

    def _check_leaving(self, entry: StreamEntry) -> None:
        if self._identity is None:
            return
        envelope: SignedEnvelope = self._identity.open(LEFT, entry.client, [], entry.body)
        if envelope.session != self._session.get(entry.client):
            raise Superseded(f"client {entry.client} is served by another worker than the one that leaves")


def _reason_of(error: WireError) -> str:
    """Return the ledger's reason for an invalid entry: a value of both RejectionReason and AbandonReason."""
    if isinstance(error, NotEnrolled):
        return RejectionReason.FOREIGN.value
    if isinstance(error, Superseded):
        return RejectionReason.SUPERSEDED.value
    return (RejectionReason.FORGED if isinstance(error, SignatureError) else RejectionReason.MALFORMED).value
