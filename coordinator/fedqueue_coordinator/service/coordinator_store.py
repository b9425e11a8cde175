"""What a coordinator does in Redis: lead, dispatch, receive, commit, close."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import redis

from fedqueue.errors import Fenced, SignatureError, StoreError
from fedqueue.protocol.coordinator_identity import CoordinatorIdentity
from fedqueue.protocol.keys import RUNS
from fedqueue.protocol.messages import Order, read
from fedqueue.protocol.signed_envelope import digest_of, packed
from fedqueue.protocol.stream_entry import StreamEntry
from fedqueue.tensors.codec import Codec
from fedqueue.tensors.frame import Frame, Manifest
from fedqueue.transport.read_ahead import ReadAhead
from fedqueue.transport.store import BlobBuffer, Call, Store, chunks_of, number
from fedqueue_coordinator.service.inbox import Inbox

if TYPE_CHECKING:  # RQ, which what only shows a run can do without
    from fedqueue.transport.rq_jobs import RqJobRecord

STAGED_SECONDS = 3600  # what a leader wrote and never committed goes by itself
LOOKED_AT = 1000  # open jobs in one commit, to see which versions nobody holds any more
MOST_ATTEMPTS, MOST_CHUNKS = 64, 4096  # of a job's payload that are deleted with it: how many there are, workers say


@dataclass(frozen=True)
class OpenJob:
    job: str
    client: str
    state: str  # "open" or "posted"
    attempt: int
    order: bytes


def new_owner() -> str:
    """A name that tells this coordinator process from every other one."""
    return uuid.uuid4().hex


class CoordinatorStore(Store):
    """Every write carries the fencing token that `lead` got; where another one leads by now, it raises Fenced."""

    def __init__(self, client: redis.Redis, run: str, owner: str, identity: CoordinatorIdentity | None = None) -> None:
        """With `authority`, what is published, ordered and reported is signed."""
        super().__init__(client, run)
        self.owner = owner
        self.identity = identity
        self.token = 0
        self._inbox = Inbox(client, self.keys)
        self.ahead = ReadAhead(self)

    # Leadership

    def lead(self, lease_seconds: float) -> bool:
        """Take the lead where nobody else has it; then `token` is the fencing token, and every script is loaded."""
        self.token = self._leader("take", lease_seconds)
        if self.token > 0:
            self.load_scripts()
        return self.token > 0

    def renew_lead(self, lease_seconds: float) -> None:
        if self._leader("renew", lease_seconds) != self.token:
            raise Fenced(f"another coordinator leads run {self.run!r} by now")

    def release_lead(self) -> None:
        self._inbox.close()
        self._leader("release", 0)

    def _leader(self, action: str, lease_seconds: float) -> int:
        return int(self.script("leader", [self.keys.leader], [action, self.owner, round(lease_seconds * 1000)]))

    # The run as a whole

    def exists(self) -> bool:
        """Whether the run is there, with a version of this epoch committed."""
        return bool(self.redis.exists(self.keys.versions))

    def create(
        self, config: str, manifest: Manifest, epoch: int = 0, clients: Iterable[str] = (), floor: int = 0
    ) -> None:
        """Write down what the run is. More clients may join than these.

        `epoch` counts how often Redis had lost it, `floor` is its first version then.
        """
        signed: dict[Any, Any] = {}
        if self.identity:
            signed["descriptor"] = self.identity.begin(config.encode(), manifest, epoch, floor)
        self.redis.hset(
            self.keys.config,
            mapping={
                "config": config,
                "manifest": manifest.pack(),
                "state": "running",
                "stopped_because": "",
                "epoch": epoch,
                **signed,
            },
        )
        self._know(clients)
        self.redis.sadd(RUNS, self.run)

    def _know(self, clients: Iterable[str]) -> None:
        if names := list(clients):
            self.redis.sadd(self.keys.clients, *names)

    def set_descriptor(self, descriptor: bytes) -> None:
        """Say under which terms this leader goes on."""
        self._require_lead(
            self.script("set_descriptor", [self.keys.leader, self.keys.config], [self.token, descriptor])
        )

    def end(
        self, stopped_because: str, retention_seconds: float, model_chunks: int, versions: Sequence[int] = ()
    ) -> None:
        """Mark the run as ended, and let its head, `versions` and records expire after `retention_seconds`.

        Working keys and other versions are deleted. The leader's key stays: a token is never given out twice.
        """
        keys = self.keys
        self._require_lead(
            self.script(
                "end_run",
                [keys.leader, keys.config, keys.head, keys.versions, keys.clients, keys.jobs, keys.pinned, keys.turns],
                [
                    self.token, stopped_because, keys.model_prefix, model_chunks + 1,  # and the seal
                    keys.site_prefix,
                    keys.updates_prefix, *versions,
                ],
            )
        )  # fmt: skip
        kept = [cast(bytes, key) for key in self.redis.scan_iter(match=keys.pattern, count=1000)]
        for key in kept:
            self.redis.expire(key, max(1, round(retention_seconds)))

    def restore(self, version: int, job_number: int, ledger: Iterable[Mapping[str, Any]]) -> None:
        """Bring back what a checkpoint knows, so that `publish` of `version` makes it the head of a new epoch."""
        records = list(ledger)
        pipe = self.redis.pipeline(transaction=True)
        pipe.delete(self.keys.ledger)
        for record in records:
            pipe.xadd(self.keys.ledger, {"record": packed(record)})
        if self.identity:
            self.identity.remember(records)
        pipe.execute()
        self.redis.hset(self.keys.head, mapping={"version": version - 1, "job_number": job_number})

    # Versions

    def publish(
        self,
        version: int,
        model: BlobBuffer,
        optimizer_state: BlobBuffer,
        records: Sequence[Mapping[str, Any]],
        totals: Mapping[str, Any],
        merged: Sequence[StreamEntry],
        keep_payloads: bool = False,
        job_number: int = 0,
        most_bytes: tuple[int, int] = (0, 0),
    ) -> set[int]:
        """Stage the version's blobs under this leader's own keys, then commit them with all that belongs to them.

        `most_bytes`: of any version, and of an update's payload, where they differ in size; else they are as `model`.
        `records` are those of the ledger, one for each version since the head: only the last of these is stored, for
        nobody could have seen the others. `merged` are the updates in all of them. Returns the versions that are still
        stored. Raises Fenced, or StoreError where the head is another one.
        """
        keys = self.keys
        lines, sums = [packed({**record, "token": self.token}) for record in records], packed(totals)
        staged = keys.staged_model(self.token), keys.staged_state(self.token)
        model_chunks, state_chunks = chunks_of(model.nbytes), chunks_of(optimizer_state.nbytes)
        first = self.begin_blob(staged[0], model, STAGED_SECONDS)
        first += self.begin_blob(staged[1], optimizer_state, STAGED_SECONDS)
        if self.identity:  # the seal is one more chunk of the model: committed, and deleted, with it
            envelope = self.identity.sign_version(version, model, optimizer_state, job_number, lines, sums)
            first.append(("SET", f"{staged[0]}:{model_chunks}", envelope, "EX", STAGED_SECONDS))
            model_chunks += 1
        most_model, most_payload = (chunks_of(max(most, model.nbytes)) for most in most_bytes)
        merged_args: list[Any] = []
        for entry in merged:
            place, _, client = entry.id.partition("@")
            merged_args += [client, place, entry.job, entry.attempt]
        answer = self.script(
            "commit",
            [keys.leader, keys.head, keys.versions, keys.ledger, keys.jobs, keys.pinned],
            [
                self.token, version, len(lines), sums,
                keys.job(""), keys.payload_prefix, keys.model_prefix, keys.state_prefix,
                model_chunks, state_chunks, int(keep_payloads), keys.attempt(""), keys.updates_prefix,
                most_model + 1, most_payload, LOOKED_AT,
                *lines, *merged_args,
            ],
            first,
        )  # fmt: skip
        if answer[0] != 1:
            for prefix, chunks in zip(staged, (model_chunks, state_chunks), strict=True):
                for i in range(chunks):
                    self.redis.unlink(f"{prefix}:{i}")
        self._require_lead(answer[0])
        if answer[0] == -2:
            raise StoreError(f"version {version} of run {self.run!r} was not committed within {STAGED_SECONDS} s")
        if answer[0] == 0:
            raise StoreError(f"version {version} does not follow the head of run {self.run!r}")
        return set(map(int, answer[1:]))

    def pin_version(self, version: int) -> None:
        """Keep a version stored whatever is committed after it."""
        self.redis.sadd(self.keys.pinned, version)

    def read_model(self, version: int, codec: Codec) -> Frame:
        """As any store's; raises SignatureError, too, where it is not what was signed."""
        wire = self.read_wire(version, codec)
        if self.identity:
            self.identity.check_version(version, self.read_version_signature(version, wire.nbytes), wire)
        return codec.decode(wire).whole()

    def read_payload(self, job: str, attempt: int, digest: str, into: BlobBuffer) -> None:
        """Fill `into` with an update's payload; raises as `read_blob`, and SignatureError for another digest."""
        self.ahead.read_span(self.keys.payload(job, attempt), 0, into, into.nbytes)
        if self.identity and digest_of(into) != digest:
            raise SignatureError(f"the payload of job {job} is not the one that its client signed")

    def expect_payloads(self, entries: Iterable[StreamEntry], codec: Codec) -> None:
        """Begin to fetch what these updates brought, one after another: they are merged in this order."""
        if not codec.zstd:  # else each says its size itself
            updates = [entry for entry in entries if entry.kind == "update"]
            self.ahead.expect((self.keys.payload(entry.job, entry.attempt), codec.nbytes) for entry in updates)

    def read_optimizer_state(self, version: int) -> bytes:
        chunks = int(cast(bytes | None, self.redis.hget(self.keys.head, "state_chunks")) or 0)
        parts = [cast(bytes | None, self.redis.get(f"{self.keys.state(version)}:{i}")) for i in range(chunks)]
        if None in parts:
            raise StoreError(f"the server optimizer's state of version {version} is not whole")
        return b"".join(cast(list[bytes], parts))

    # Jobs

    def dispatch(self, order: Order, packed: bytes, record: RqJobRecord, number: int, lease_seconds: float) -> None:
        """Open the job and put it into its client's queue, both in one exchange; doing it twice changes nothing.

        `packed` is the order as `pack_order` gives it. Where another coordinator leads, the job that is in the queue
        by then is not open, so no worker would begin it; it is taken back.
        """
        keys, job = self.keys, order.job
        opening = (
            "dispatch",
            [
                keys.leader, keys.job(job), keys.attempt(job), keys.jobs, keys.site(order.client), keys.head,
                keys.clients, keys.turns,
            ],
            [self.token, job, order.client, packed, round(lease_seconds * 1000), number],
        )  # fmt: skip
        led, enqueued = self.scripts([opening, _enqueueing(record)])
        if led == -1 and enqueued:
            self.redis.lrem(record.queue, 0, job)
            self.redis.delete(record.key)
        self._require_lead(led)

    def enqueue(self, record: RqJobRecord) -> None:
        """Put a job that is open into its queue again, unless RQ still knows it."""
        self.scripts([_enqueueing(record)])

    def pack_order(self, order: Order) -> bytes:
        return self.identity.sign_order(order) if self.identity else order.pack()

    def unpack_order(self, data: bytes) -> Order:
        """An order that lies in a job's record; raises WireError where it is not this coordinator's."""
        return self.identity.open_order(data) if self.identity else read(Order, data)

    def job_number(self) -> int:
        return int(cast(bytes | None, self.redis.hget(self.keys.head, "job_number")) or 0)

    def last_jobs(self) -> dict[str, int]:
        """Client → the number of its last job."""
        turns = cast(dict[bytes, bytes], self.redis.hgetall(self.keys.turns))
        return {client.decode(): int(number) for client, number in turns.items()}

    def jobs(self) -> list[OpenJob]:
        """Every job that is dispatched or posted and not in the ledger yet."""
        names = sorted(job.decode() for job in cast(set[bytes], self.redis.smembers(self.keys.jobs)))
        pipe = self.redis.pipeline(transaction=False)
        for job in names:
            pipe.hmget(self.keys.job(job), "client", "order")
            pipe.hmget(self.keys.attempt(job), "posted", "number")
        answers = pipe.execute()
        return [
            OpenJob(job, client.decode(), "posted" if posted else "open", number(attempt), order)
            for job, (client, order), (posted, attempt) in zip(names, answers[::2], answers[1::2], strict=True)
            if client is not None
        ]

    def close(
        self,
        job: str,
        record: Mapping[str, Any],
        payload_chunks: int,
        entry: str = "",
        if_lapsed: bool = False,
        unless_posted: bool = False,
    ) -> bool:
        """End a job without merging it; False where it had ended before, its lease is not over, or it was posted."""
        condition = "lapsed" if if_lapsed else "unposted" if unless_posted else "any"
        keys = self.keys
        place, _, feedback = entry.partition("@")
        answer = self.script(
            "close",
            [keys.leader, keys.job(job), keys.attempt(job), keys.jobs, keys.ledger, keys.updates(feedback)],
            [
                self.token, job, packed(record), place, condition, f"{keys.payload_prefix}{job}:",
                payload_chunks, keys.site_prefix, MOST_ATTEMPTS, MOST_CHUNKS,
            ],
        )  # fmt: skip
        self._require_lead(answer)
        return bool(answer)

    def is_posted(self, job: str) -> bool:
        """Whether an update of the job waits for its merge, or an ending for its record."""
        return bool(self.redis.hexists(self.keys.attempt(job), "posted"))

    def ack(self, entry: str, record: Mapping[str, Any] | None) -> bool:
        """Acknowledge an entry that is no update, with a ledger record where there is one; False: it was before."""
        place, _, feedback = entry.partition("@")
        answer = self.script(
            "ack",
            [self.keys.leader, self.keys.ledger, self.keys.updates(feedback)],
            [self.token, packed(record) if record else b"", place],
        )
        self._require_lead(answer)
        return bool(answer)

    def find_expired(self) -> tuple[list[str], list[str]]:
        """Jobs whose lease is over, and clients that are no longer alive, by the server's clock."""
        keys = self.keys
        jobs, clients = self.script("find_expired", [keys.jobs, keys.clients], [keys.attempt(""), keys.site_prefix])
        return [j.decode() for j in jobs], [c.decode() for c in clients]

    def expire_client(self, client: str) -> bool:
        """Take a client that is no longer alive off the lists; False where it has come back."""
        return bool(self.script("expire_client", [self.keys.site(client)], []))

    def is_served(self, client: str) -> bool:
        """Whether some worker holds the client by now."""
        return bool(self.redis.hexists(self.keys.site(client), "holder"))

    # What workers report

    def receive(self, block_seconds: float, count: int = 32) -> list[StreamEntry]:
        """The next entries, as `Inbox.receive`."""
        return self._inbox.receive(block_seconds, count)

    def sweep(self, count: int = 32) -> list[StreamEntry]:
        """The next entries, as `Inbox.sweep`."""
        return self._inbox.sweep(count)

    def unacknowledged(self) -> list[StreamEntry]:
        """Every entry that no script has acknowledged, as `Inbox.unacknowledged`."""
        return self._inbox.unacknowledged()

    def report(self, kind: str, body: bytes) -> None:
        """Append an entry of the coordinator's own, such as a finished evaluation."""
        if self.identity:
            body = self.identity.sign_evaluation(body)
        pipe = self.redis.pipeline(transaction=False)
        pipe.xadd(self.keys.updates(""), {"kind": kind, "body": body})
        pipe.publish(self.keys.wakeup, self.keys.updates(""))
        pipe.execute()

    def _require_lead(self, answer: int) -> None:
        if answer == -1:
            raise Fenced(f"another coordinator leads run {self.run!r} by now; nothing was written")


def _enqueueing(record: RqJobRecord) -> Call:
    return "enqueue", [record.key, record.queue], [record.job, *record.fields]
