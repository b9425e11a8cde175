"""What a worker does in Redis: serve clients, claim jobs, fetch versions, post updates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import redis

from fedqueue.errors import JobClosed, SignatureError
from fedqueue.protocol.messages import Ending, Order, Registration, Update, pack, read
from fedqueue.protocol.signed_envelope import JOINED, LEFT, digest_of, unverified_body
from fedqueue.protocol.site_identity import SiteIdentity
from fedqueue.tensors.codec import Codec
from fedqueue.tensors.frame import Frame
from fedqueue.transport.store import BlobBuffer, Store
from fedqueue.transport.zero_copy import Command

SCRIPTS = ("join", "register", "leave", "claim", "release", "heartbeat", "post")
"""The scripts that a worker runs, and no others."""
PAYLOAD_SECONDS = 3600  # a payload that is never posted goes by itself; posting makes it stay


@dataclass(frozen=True)
class Claim:
    """One attempt at a job, on the version it will train from."""

    job: str
    attempt: int
    version: int
    epoch: int = 0
    client: str = ""


@dataclass(frozen=True)
class HeartbeatReply:
    """The answer to a heartbeat."""

    run_state: str
    holds_job: bool
    lost_clients: tuple[str, ...]


class WorkerStore(Store):
    """`token` tells this worker process from every other one."""

    def __init__(self, client: redis.Redis, run: str, token: str, identity: SiteIdentity | None = None) -> None:
        """With `trust`, everything that is said is signed, and every version that is fetched is checked."""
        super().__init__(client, run)
        self.token = token
        self.identity = identity

    def key_of(self, client: str) -> str:
        """The id of the key that signs for the client now; empty where nothing is signed."""
        return self.identity.key_of(client) if self.identity else ""

    def join(self, candidates: Sequence[str], lease_seconds: float) -> str | None:
        """Serve the first candidate that no other living worker serves; None where there is none."""
        client = self.script(
            "join", [self.keys.clients], [self.token, _ms(lease_seconds), self.keys.site_prefix, *candidates]
        )
        return client.decode() if client else None

    def register(self, registration: Registration) -> bool:
        """Say that the client has its data and is ready; False where another worker serves it by now."""
        if self.identity:
            self.identity.enter(self.info())  # it may be another epoch by now
        client = registration.client
        said = self._sealed(JOINED, client, [], registration.pack())
        keys = [self.keys.site(client), self.keys.updates(client)]
        return bool(self.script("register", keys, [self.token, said, self.keys.wakeup]))

    def leave(self, clients: Sequence[str]) -> None:
        for client in clients:
            said = self._sealed(LEFT, client, [], b"")
            keys = [self.keys.site(client), self.keys.updates(client)]
            self.script("leave", keys, [self.token, said, self.keys.wakeup])

    def claim(self, job: str, lease_seconds: float, client: str = "") -> Claim:
        """Begin an attempt; raises JobClosed where the job has ended, which is counted for `client`."""
        keys = self.keys
        answer = self.script(
            "claim",
            [keys.job(job), keys.attempt(job), keys.head, keys.config, keys.site(client)],
            [self.token, _ms(lease_seconds)],
        )
        if not answer:
            raise JobClosed(f"job {job} is not open any more")
        claim = Claim(job, int(answer[0]), int(answer[1]), int(answer[2]), answer[3].decode())
        if self.identity and claim.epoch != self.identity.scope.epoch:
            self.identity.enter(self.info())
        return claim

    def open_order(self, said: bytes | dict[str, Any]) -> Order:
        """The order that came with a job: a seal, or a map where the run is not signed; raises WireError."""
        if self.identity is None:
            return read(Order, unverified_body(said) if isinstance(said, bytes) else pack(said))
        if not isinstance(said, bytes):
            raise SignatureError("the order of a job is not signed")
        try:
            body = self.identity.order(said)
        except SignatureError:  # it may be of a later epoch than this site knows
            self.identity.enter(self.info())
            body = self.identity.order(said)
        return read(Order, body)

    def fetch(self, version: int, into: BlobBuffer) -> None:
        """The version that `claim` named; it stays stored until the attempt releases it or ends.

        Raises SignatureError where it is not what the coordinator signed, or older than one that was there before.
        """
        if self.identity is None:
            self.read_blob(self.keys.model(version), into)
            return
        envelope = self.read_signed_version(version, into)
        if self.identity.goes_back(version):
            self.identity.enter(self.info())
        self.identity.check_version(version, into, envelope)

    def fetch_model(self, version: int, codec: Codec, into: Frame) -> None:
        """The same, decoded; raises WireError, too, where it is no such frame."""
        if codec.identity:
            self.fetch(version, into.buffer)
            return
        wire = np.empty(self.blob_size(self.keys.model(version), codec), np.uint8)
        self.fetch(version, wire)
        into.buffer[:] = codec.decode(wire).whole().buffer

    def release_base(self, claim: Claim) -> None:
        self.script("release", [self.keys.job(claim.job), self.keys.attempt(claim.job)], [claim.attempt])

    def heartbeat(
        self, clients: Sequence[str], lease_seconds: float, current: Claim | None, progressing: bool
    ) -> HeartbeatReply:
        state, holds, *lost = self.script(
            "heartbeat",
            [self.keys.config],
            [
                self.token,
                _ms(lease_seconds),
                current.job if current else "",
                current.attempt if current else 0,
                int(progressing),
                self.keys.site_prefix,
                self.keys.job(""),
                self.keys.attempt(""),
                *clients,
            ],
        )
        return HeartbeatReply(state.decode(), bool(holds), tuple(c.decode() for c in lost))

    def described(self, update: Update, payload: BlobBuffer) -> Update:
        """The header with the payload's digest, where updates are signed; one that has it already stays as it is."""
        if self.identity is None or update.digest:
            return update
        return update.model_copy(update={"digest": digest_of(payload)})

    def post(self, claim: Claim, update: Update, payload: BlobBuffer, then: Sequence[Command] = ()) -> str:
        """Store the payload, then append the update if the attempt still holds the job; `then` travels behind it.

        Returns an empty string, or why it was refused: `closed`, `replayed`, `attempt`, `payload` or `old_epoch`.
        """
        update = self.described(update, payload)
        prefix = self.keys.payload(claim.job, claim.attempt)
        chunks = [f"{prefix}:{i}" for i in range(update.chunks)]
        first = self.begin_blob(prefix, payload, PAYLOAD_SECONDS)
        return self._post(claim, "update", update.pack(), chunks, first, then)

    def end(self, claim: Claim, ending: Ending) -> str:
        """Report that the attempt ends without an update; returns as `post` does."""
        return self._post(claim, "ended", ending.pack(), [])

    def _post(
        self, claim: Claim, kind: str, body: bytes, chunks: list[str],
        first: Sequence[Command] = (), then: Sequence[Command] = (),
    ) -> str:  # fmt: skip
        keys, job, client = self.keys, claim.job, claim.client
        body = self._sealed(kind, claim.client, [claim.job, claim.attempt, claim.version], body)
        reason: bytes = self.script(
            "post",
            [keys.job(job), keys.attempt(job), keys.site(client), keys.updates(client), keys.config, *chunks],
            [job, claim.attempt, kind, body, claim.epoch, keys.wakeup],
            first,
            then,
        )
        return reason.decode()

    def _sealed(self, kind: str, client: str, about: Sequence[str | int], body: bytes) -> bytes:
        return self.identity.sign(kind, client, about, body) if self.identity else body


def _ms(seconds: float) -> int:
    return round(seconds * 1000)
