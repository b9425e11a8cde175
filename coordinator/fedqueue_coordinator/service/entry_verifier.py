"""What an entry of the updates stream says, as an event, and whether it was said by whom it names.

Whoever can write to Redis can append entries in anybody's name. So what does not hold is never held against the client
that it names: its job ends, and it rests, but it is not set aside for what others did.
"""

from __future__ import annotations

from fedqueue.errors import NotEnrolled, SignatureError, Superseded, WireError
from fedqueue.protocol.coordinator_identity import CoordinatorIdentity
from fedqueue.protocol.messages import Ending, Evaluation, Registration, read
from fedqueue.protocol.signed_envelope import ENDED, JOINED, LEFT, UPDATE, SignedEnvelope
from fedqueue.protocol.stream_entry import StreamEntry
from fedqueue_coordinator.core.admission import FOREIGN, FORGED, MALFORMED, SUPERSEDED
from fedqueue_coordinator.core.events import ClientJoined, ClientLeft, Evaluated, Event, JobEnded, UpdateArrived


class EntryVerifier:
    """Without an authority, everybody is believed."""

    def __init__(self, identity: CoordinatorIdentity | None) -> None:
        self._authority = identity
        self._session: dict[str, str] = {}  # client → the worker process that registered it last
        self._former: set[tuple[str, str]] = set()

    def to_event(self, entry: StreamEntry) -> Event:
        """The event of an entry; raises WireError, or SignatureError as one, where it is none that counts.

        An update or an ending that does not hold is an event nevertheless: the store took it for the job's end.
        """
        match entry.kind:
            case "update":
                return self._update(entry)
            case "ended":
                return self._ending(entry)
            case "joined":
                registration = self.registration(entry.client, entry.body)
                return ClientJoined(registration.client, registration.examples)
            case "left":
                self._leaving(entry)
                return ClientLeft(entry.client)
            case "evaluated":
                body = self._authority.open_evaluation(entry.body) if self._authority else entry.body
                result = read(Evaluation, body)
                return Evaluated(result.version, result.metrics, result.error)
        raise WireError(f"entry of kind {entry.kind!r}")

    def registration(self, client: str, data: bytes) -> Registration:
        """A client's registration, out of the stream or of the list of clients; raises WireError.

        One that a former worker process of the client signed is refused: it was said before, and is said again by
        somebody else.
        """
        if self._authority is None:
            registration = read(Registration, data)
            if registration.client != client:
                raise WireError(f"registration of {registration.client} by {client}")
            return registration
        envelope = self._authority.open(JOINED, client, [], data)
        registration = read(Registration, envelope.body)
        if registration.client != client:
            raise SignatureError(f"client {client} signed a registration of {registration.client}")
        if (client, envelope.session) in self._former:
            raise Superseded(f"a registration of client {client} comes back, whom another worker has registered since")
        present = self._session.get(client)
        if present is not None and present != envelope.session:
            self._former.add((client, present))
        self._session[client] = envelope.session
        return registration

    def trusts(self, client: str) -> bool:
        """Whether the client's word still counts: revoking takes effect while a run goes on."""
        return self._authority is None or self._authority.is_enrolled(client)

    def _update(self, entry: StreamEntry) -> UpdateArrived:
        body, distrust = entry.body, None
        try:
            body = self._said(UPDATE, entry)
        except SignatureError as error:
            distrust = reason_of(error), str(error)
        return UpdateArrived(entry.id, entry.job, entry.attempt, entry.client, entry.base, body, distrust)

    def _ending(self, entry: StreamEntry) -> JobEnded:
        try:
            ending = read(Ending, self._said(ENDED, entry))
        except SignatureError as error:
            return JobEnded(entry.id, entry.job, entry.client, reason_of(error), str(error))
        return JobEnded(entry.id, entry.job, entry.client, ending.reason, ending.error)

    def _said(self, kind: str, entry: StreamEntry) -> bytes:
        if self._authority is None:
            return entry.body
        return self._authority.open(kind, entry.client, [entry.job, entry.attempt, entry.base], entry.body).body

    def _leaving(self, entry: StreamEntry) -> None:
        if self._authority is None:
            return
        envelope: SignedEnvelope = self._authority.open(LEFT, entry.client, [], entry.body)
        if envelope.session != self._session.get(entry.client):
            raise Superseded(f"client {entry.client} is served by another worker than the one that leaves")


def reason_of(error: WireError) -> str:
    """The reason under which the ledger counts what this error is about."""
    if isinstance(error, NotEnrolled):
        return FOREIGN
    if isinstance(error, Superseded):
        return SUPERSEDED
    return FORGED if isinstance(error, SignatureError) else MALFORMED
