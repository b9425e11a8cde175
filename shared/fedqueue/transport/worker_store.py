"""What a worker does in Redis: serve clients, claim jobs, download versions, post updates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import redis

from fedqueue.errors import JobClosed, SignatureError, WireError
from fedqueue.protocol.messages import (
    MAX_PIECES,
    PIECE_BYTES,
    AnswerPiece,
    Ending,
    Order,
    Question,
    Registration,
    Unavailable,
    Update,
    read,
)
from fedqueue.protocol.msgpack import MAX_MESSAGE, pack
from fedqueue.protocol.phase import Phase
from fedqueue.protocol.post_result import PostResult
from fedqueue.protocol.signed_envelope import JOINED, LEFT, UNAVAILABLE, digest_of, unverified_body
from fedqueue.protocol.site_identity import SiteIdentity
from fedqueue.tensors import blobs
from fedqueue.tensors.blobs import BlobBuffer, chunks_of
from fedqueue.tensors.codec import Codec
from fedqueue.tensors.frame import Frame
from fedqueue.transport.line_speed import LineSpeed
from fedqueue.transport.store import Store
from fedqueue.transport.transfer import PAYLOAD_SECONDS, Download, Upload
from fedqueue.transport.zero_copy import Command, Moved, ignore_moved

ANSWER_SECONDS = 3600
"""How long an answer stays stored that the coordinator does not fetch."""


@dataclass(frozen=True)
class Claim:
    """One attempt at a job, with the version to train from."""

    job: str
    attempt: int
    version: int
    epoch: int = 0
    client: str = ""
    lease_seconds: float = 0.0


@dataclass(frozen=True)
class HeartbeatReply:
    """The reply to a heartbeat: the run's state, whether the job is still this worker's, and lost clients."""

    run_state: str
    owns_job: bool
    lost_clients: tuple[str, ...]


class WorkerStore(Store):
    """A worker process's view of the run; the random `token` names this process."""

    def __init__(self, client: redis.Redis, run: str, token: str, identity: SiteIdentity | None = None) -> None:
        """With `identity`, this store signs all its messages, and verifies every order and version."""
        super().__init__(client, run)
        self.token = token
        self.downlink, self.uplink = LineSpeed(), LineSpeed()
        self.identity = identity

    def key_of(self, client: str) -> str:
        """The id of the client's present signing key; empty in an unsigned run."""
        return self.identity.key_of(client) if self.identity else ""

    def join(self, candidates: Sequence[str], lease_seconds: float) -> str | None:
        """Begin to serve the first candidate that no other living worker serves; None if every one is served."""
        client = self.script(
            "join", [self.keys.clients], [self.token, _ms(lease_seconds), self.keys.site_prefix, *candidates]
        )
        return client.decode() if client else None

    def register(self, registration: Registration) -> bool:
        """Report that the client's data is loaded and it is ready for jobs; False if another worker serves it."""
        if self.identity:
            self.identity.enter(self.info())  # the run may be in a later epoch
        client = registration.client
        body = self._signed(JOINED, client, [], registration.pack())
        keys = [self.keys.site(client), self.keys.updates(client)]
        return bool(self.script("register", keys, [self.token, body, self.keys.wakeup]))

    def leave(self, clients: Sequence[str]) -> None:
        """Release these clients, so that another worker can serve them at once."""
        for client in clients:
            self._release(client, LEFT, b"")

    def report_unavailable(self, unavailable: Unavailable) -> None:
        """Release the client, and report why its data cannot be loaded."""
        self._release(unavailable.client, UNAVAILABLE, unavailable.pack())

    def _release(self, client: str, kind: str, body: bytes) -> None:
        keys = [self.keys.site(client), self.keys.updates(client)]
        self.script("leave", keys, [self.token, kind, self._signed(kind, client, [], body), self.keys.wakeup])

    def claim(self, job: str, lease_seconds: float, client: str = "") -> Claim:
        """Begin an attempt; raises JobClosed, and counts it for `client`, if the job is not open."""
        keys = self.keys
        answer = self.script(
            "claim",
            [keys.job(job), keys.attempt(job), keys.head, keys.config, keys.site(client)],
            [self.token, _ms(lease_seconds)],
        )
        if not answer:
            raise JobClosed(f"job {job} is no longer open")
        claim = Claim(job, int(answer[0]), int(answer[1]), int(answer[2]), answer[3].decode(), lease_seconds)
        if self.identity and claim.epoch != self.identity.scope.epoch:
            self.identity.enter(self.info())
        return claim

    def open_order(self, order: bytes | dict[str, Any]) -> Order:
        """The order in an RQ job: an envelope, or a map in an unsigned run; raises WireError if it is not valid."""
        if self.identity is None:
            return read(Order, unverified_body(order) if isinstance(order, bytes) else pack(order))
        if not isinstance(order, bytes):
            raise SignatureError("the order of a job is not signed")
        try:
            body = self.identity.order(order)
        except SignatureError:  # the order may belong to an epoch that this site has not entered
            self.identity.enter(self.info())
            body = self.identity.order(order)
        return read(Order, body)

    def question(self) -> Question | None:
        """What is asked of the sites before the run begins; None for nothing, or for a user without the right to it.

        Raises SignatureError where the coordinator did not sign it, and WireError where it is not valid.
        """
        try:
            data = cast(bytes | None, self.redis.getrange(self.keys.question, 0, MAX_MESSAGE))
        except redis.exceptions.NoPermissionError:  # of an ACL that was written before there were questions
            return None
        if not data:
            return None
        question = read(Question, self.identity.question(data) if self.identity else data)
        if question.run != self.run:
            raise WireError(f"question about run {question.run}")
        return question

    def take_question(self, question: Question, client: str) -> bool:
        """Whether this process is to answer the question for the client: it is the first one that wants to."""
        key = self.keys.answer(client)
        taken = bool(self.redis.hsetnx(key, f"claim:{question.part}", self.token))
        self.redis.expire(key, ANSWER_SECONDS)
        return taken

    def answer(self, question: Question, client: str, body: bytes, refusal: str = "") -> None:
        """Store the answer to the question for the client, in signed pieces; raises WireError for too long a body."""
        pieces = [body[i : i + PIECE_BYTES] for i in range(0, len(body), PIECE_BYTES)] or [b""]
        if len(pieces) > MAX_PIECES:
            raise WireError(f"an answer of {len(body)} bytes; at most {MAX_PIECES * PIECE_BYTES} are allowed")
        fields: dict[str, bytes] = {}
        for i, piece in enumerate(pieces):
            message = AnswerPiece(
                client=client, part=question.part, piece=i, pieces=len(pieces), body=piece, refusal=refusal
            ).pack()
            if self.identity:
                message = self.identity.sign_answer(client, question.instance, [question.part, i], message)
            fields[f"{question.part}:{i}"] = message
        key = self.keys.answer(client)
        pipe = self.redis.pipeline(transaction=True)
        pipe.hset(key, mapping=cast(Any, fields))
        pipe.expire(key, ANSWER_SECONDS)
        pipe.execute()

    def download(self, version: int, into: BlobBuffer, moved: Moved = ignore_moved) -> Download:
        """Begin to fetch the version that `claim` named, which stays stored until the attempt releases it or ends."""
        signature = self.signature_key(version, into.nbytes) if self.identity else ""
        return Download(self, self.downlink, self.keys.model(version), into, signature, moved)

    def download_frozen(self, into: BlobBuffer, moved: Moved = ignore_moved) -> Download:
        """Begin to fetch the model's frozen tensors."""
        return Download(self, self.downlink, self.keys.frozen, into, "", moved)

    def verify(self, version: int, download: Download) -> str:
        """The digest of the version as it is stored, verified; empty in an unsigned run.

        Raises SignatureError if the coordinator did not sign the version, or a newer version was seen.
        """
        if self.identity is None:
            return ""
        if self.identity.goes_back(version):
            self.identity.enter(self.info())
        return self.identity.check_version(version, download.into, download.envelope or b"")

    def keeper_keys(self, keepers: Sequence[str]) -> list[bytes | None]:
        """The key that each keeper's seeds are encrypted to, verified; None while a keeper has not stored one.

        `keepers` are those of the run, in the order of their components. Raises SignatureError for a key that the
        keeper did not sign for this run instance and component.
        """
        if self.identity is None:
            raise SignatureError("the keys of keepers cannot be verified in an unsigned run")
        pipe = self.redis.pipeline(transaction=False)
        for keeper in keepers:
            pipe.getrange(self.keys.keeper(keeper), 0, MAX_MESSAGE)
        return [
            self.identity.keeper_key(keeper, component, data) if data else None
            for component, (keeper, data) in enumerate(zip(keepers, pipe.execute(), strict=True))
        ]

    def verify_frozen(self, frozen: BlobBuffer) -> None:
        """Raise SignatureError for other tensors than those that the coordinator signed."""
        if self.identity:
            self.identity.check_frozen(frozen)

    def fetch(self, version: int, into: BlobBuffer) -> None:
        """Fill `into` with a version; raises as `read_blob` and `verify`."""
        download = self.download(version, into)
        while download.step():
            pass
        self.verify(version, download)

    def fetch_model(self, version: int, codec: Codec, into: Frame) -> None:
        """`fetch` and decode; raises as `fetch`, and WireError for bytes that are no such frame."""
        wire = self.memory_for(version, codec, into)
        self.fetch(version, wire)
        decode_into(into, codec, wire)

    def memory_for(self, version: int, codec: Codec, into: Frame) -> BlobBuffer:
        """Memory for the version as stored: that of `into` if it is stored as it is; raises as `blob_size`."""
        return into.buffer if codec.identity else np.empty(self.blob_size(self.keys.model(version), codec), np.uint8)

    def release_base(self, claim: Claim) -> None:
        """Let the base version be deleted, once it is downloaded and the merge does not need it."""
        self.script("release", [self.keys.job(claim.job), self.keys.attempt(claim.job)], [claim.attempt])

    def heartbeat(
        self,
        clients: Sequence[str],
        lease_seconds: float,
        current: Claim | None,
        progressing: bool,
        phase: Phase = Phase.TRAINING,
        job_lease_seconds: float | None = None,
    ) -> HeartbeatReply:
        """Renew the leases of `clients`, of their queued jobs and, if `progressing`, of the current job.

        The current job's lease is `job_lease_seconds` long, by default as long as the others.
        """
        state, owns_job, *lost = self.script(
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
                str(phase),
                _ms(lease_seconds if job_lease_seconds is None else job_lease_seconds),
                *clients,
            ],
        )
        return HeartbeatReply(state.decode(), bool(owns_job), tuple(c.decode() for c in lost))

    def described(self, update: Update, payload: BlobBuffer) -> Update:
        """The header, in a signed run with the payload's digest; an existing digest is kept."""
        if self.identity is None or update.digest:
            return update
        return update.model_copy(update={"digest": digest_of(payload)})

    def upload(
        self,
        claim: Claim,
        payload: BlobBuffer,
        lease_seconds: Callable[[], float] | None = None,
        moved: Moved = ignore_moved,
    ) -> Upload:
        """Begin to store the attempt's payload; each piece makes the job's lease `lease_seconds()` long."""
        keys, prefix = self.keys, self.keys.payload(claim.job, claim.attempt)
        chunks = [f"{prefix}:{i}" for i in range(chunks_of(payload.nbytes))]

        def store_piece(start: int, piece: Any, first: list[Command]) -> int:
            lease = _ms(lease_seconds() if lease_seconds else claim.lease_seconds)
            stored: int = self.script(
                "store_piece",
                [keys.job(claim.job), keys.attempt(claim.job), *chunks],
                [claim.attempt, lease, PAYLOAD_SECONDS, blobs.CHUNK, start, piece],
                first,
                moved=moved,
            )
            return stored

        return Upload(store_piece, self.uplink, prefix, payload, moved)

    def post(
        self,
        claim: Claim,
        update: Update,
        payload: BlobBuffer,
        then: Sequence[Command] = (),
        upload: Upload | None = None,
    ) -> PostResult:
        """Store what `upload` has not stored of the payload, then append the update to the client's stream.

        Only a job that is open for this attempt gets the update. The commands `then` travel after it. It is safe to
        repeat: a repeated post returns REPLAYED.
        """
        update = self.described(update, payload)
        upload = upload or self.upload(claim, payload)
        while upload.step():
            pass
        prefix = self.keys.payload(claim.job, claim.attempt)
        chunks = [f"{prefix}:{i}" for i in range(update.chunks)]
        first = upload.commands_for_post()
        with self.uplink.measured(payload.nbytes) if first else nullcontext():
            return self._post(claim, "update", update.pack(), chunks, first, then, upload.moved)

    def end(self, claim: Claim, ending: Ending) -> PostResult:
        """Report that the attempt ended without an update; returns as `post`."""
        return self._post(claim, "ended", ending.pack(), [])

    def _post(
        self, claim: Claim, kind: str, body: bytes, chunks: list[str],
        first: Sequence[Command] = (), then: Sequence[Command] = (), moved: Moved = ignore_moved,
    ) -> PostResult:  # fmt: skip
        keys, job, client = self.keys, claim.job, claim.client
        body = self._signed(kind, claim.client, [claim.job, claim.attempt, claim.version], body)
        reason: bytes = self.script(
            "post",
            [keys.job(job), keys.attempt(job), keys.site(client), keys.updates(client), keys.config, *chunks],
            [job, claim.attempt, kind, body, claim.epoch, keys.wakeup],
            first,
            then,
            moved,
        )
        return PostResult(reason.decode())

    def _signed(self, kind: str, client: str, about: Sequence[str | int], body: bytes) -> bytes:
        return self.identity.sign(kind, client, about, body) if self.identity else body


def _ms(seconds: float) -> int:
    return round(seconds * 1000)


def decode_into(into: Frame, codec: Codec, wire: BlobBuffer) -> None:
    """Decode a version that `WorkerStore.memory_for` had memory for; raises WireError for bytes that are no frame."""
    if not codec.identity:
        into.buffer[:] = codec.decode(wire).whole().buffer
