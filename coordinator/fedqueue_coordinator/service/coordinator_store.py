"""What a coordinator does in Redis: lead a run, dispatch jobs, receive reports, commit versions, close jobs."""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, cast

import redis
import structlog

from fedqueue.errors import Fenced, SignatureError, StoreError, WireError
from fedqueue.protocol.coordinator_identity import CoordinatorIdentity
from fedqueue.protocol.keys import RUNS
from fedqueue.protocol.messages import Order, read
from fedqueue.protocol.msgpack import MAX_MESSAGE, pack_record
from fedqueue.protocol.phase import Phase
from fedqueue.protocol.signed_envelope import digest_of
from fedqueue.protocol.stream_entry import StreamEntry, split_entry_id
from fedqueue.tensors.blobs import BlobBuffer, chunks_of
from fedqueue.tensors.codec import Codec
from fedqueue.tensors.frame import Frame
from fedqueue.tensors.manifest import Manifest
from fedqueue.transport.lua_scripts import Call
from fedqueue.transport.store import Store, number
from fedqueue_coordinator.core.lapses import LastReport
from fedqueue_coordinator.core.reasons import JobState
from fedqueue_coordinator.service.inbox import Inbox, by_stream
from fedqueue_coordinator.service.read_ahead import ReadAhead

if TYPE_CHECKING:  # RQ, which a command that only shows a run does without
    from fedqueue.transport.rq_jobs import RqJobRecord

log = structlog.get_logger("fedqueue.coordinator")

T = TypeVar("T")

CLEAR_SECONDS = 60.0  # the lease while a run is deleted
STAGED_SECONDS = 3600  # after which blobs expire that a leader staged and never committed
SCANNED_JOBS = 1000  # open jobs that one commit may scan for the base versions that they need
SITES_AT_ONCE = 1000  # clients in one script, or keys in one pipeline: others wait for the server meanwhile
MOST_ATTEMPTS, MOST_CHUNKS = 64, 4096  # bounds on the payload keys deleted with a job: workers write these counts


@dataclass(frozen=True)
class OpenJob:
    """A job that has not ended: dispatched, and possibly posted."""

    job: str
    client: str
    state: JobState
    attempt: int
    order: bytes


@dataclass(frozen=True)
class Answer:
    """An entry of a keeper's stream of answers, not verified."""

    keeper: str
    position: str
    """In the stream."""
    kind: str
    body: bytes


def new_owner() -> str:
    """A random name for this coordinator process, to own the leader lease with."""
    return uuid.uuid4().hex


class CoordinatorStore(Store):
    """Every write carries the fencing token that `lead` got; it raises Fenced once another coordinator leads."""

    def __init__(self, client: redis.Redis, run: str, owner: str, identity: CoordinatorIdentity | None = None) -> None:
        """With `identity`, this store signs versions, orders and evaluations, and checks what it reads back."""
        super().__init__(client, run)
        self.owner = owner
        self.identity = identity
        self.token = 0
        self._inbox = Inbox(client, self.keys)
        self.ahead = ReadAhead(self)

    # Leadership

    def lead(self, lease_seconds: float) -> bool:
        """Acquire the leader lease if it is free; then `token` is the fencing token, and every script is loaded."""
        self.token = self._leader("take", lease_seconds, "")
        if self.token > 0:
            self.load_scripts()
        return self.token > 0

    def renew_lead(self, lease_seconds: float, waiting: str | None = None) -> None:
        """Extend the leader lease; raises Fenced if another coordinator leads.

        `waiting`, what keeps the run from going on, is for `fedqueue status`; None leaves it as it was.
        """
        if self._leader("renew", lease_seconds, *(() if waiting is None else (waiting,))) != self.token:
            raise Fenced(f"another coordinator leads run {self.run!r} by now")

    def has_leader_key(self) -> bool:
        """Whether Redis has the key of the leader lease, which stays for as long as the run."""
        return bool(self.redis.exists(self.keys.leader))

    def release_lead(self) -> None:
        """Give the leader lease back, so that another coordinator need not wait for its end."""
        self._inbox.close()
        self._leader("release", 0)

    def _leader(self, action: str, lease_seconds: float, *waiting: str) -> int:
        arguments = [action, self.owner, round(lease_seconds * 1000), *waiting]
        return int(self.script("leader", [self.keys.leader], arguments))

    # The run as a whole

    def exists(self) -> bool:
        """Whether Redis has this run with at least one version committed in the present epoch.

        A run whose head or configuration Redis has deleted to free memory cannot be resumed, so it does not exist.
        """
        pipe = self.redis.pipeline(transaction=False)
        pipe.exists(self.keys.versions, self.keys.config)
        pipe.hexists(self.keys.head, "version")  # a dispatch writes the head's job number again
        stored, has_head = pipe.execute()
        return stored == 2 and bool(has_head)

    def has_configuration(self) -> bool:
        """Whether Redis has the run's configuration, so that commands find the run."""
        return bool(self.redis.exists(self.keys.config))

    def has_remains(self) -> bool:
        """Whether Redis has kept versions or records of a run that does not exist."""
        return bool(self.redis.exists(self.keys.versions, self.keys.ledger)) and not self.exists()

    def has_ended(self) -> bool:
        """Whether Redis still has this run after its end."""
        return self.redis.hget(self.keys.config, "state") == b"ended"

    def create(
        self,
        config: str,
        manifest: Manifest,
        epoch: int = 0,
        clients: Iterable[str] = (),
        first_version: int = 0,
        frozen: BlobBuffer | None = None,
    ) -> None:
        """Write the run's configuration, manifest, frozen tensors and clients; more clients may join later.

        `epoch` is the number of times that Redis has lost the run, and `first_version` the version that this epoch
        starts from.
        """
        signed: dict[Any, Any] = {}
        if frozen is not None:
            self.write_blob(self.keys.frozen, frozen)
        if self.identity:
            descriptor = self.identity.begin(config.encode(), manifest.pack(), epoch, first_version, frozen)
            signed["descriptor"] = descriptor
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
        if names := list(clients):
            self.redis.sadd(self.keys.clients, *names)
        self.redis.sadd(RUNS, self.run)

    def set_descriptor(self, descriptor: bytes) -> None:
        """Replace the signed run descriptor, which states this leader's term; raises Fenced."""
        self._require_lead(
            self.script("set_descriptor", [self.keys.leader, self.keys.config], [self.token, descriptor])
        )

    def end(
        self,
        stopped_because: str,
        retention_seconds: float,
        model_chunks: int,
        versions: Sequence[int] = (),
        keepers: Sequence[str] = (),
        failed: bool = False,
    ) -> None:
        """Mark the run as ended, or as `failed`; its head, `versions` and records expire after `retention_seconds`.

        Working keys, those of `keepers` included, and all other versions are deleted. The leader's key stays, so that
        no fencing token is issued twice. `model_chunks` is the number of chunks of the largest version. Raises Fenced.
        """
        keys = self.keys
        self._require_lead(
            self.script(
                "end_run",
                [
                    keys.leader, keys.config, keys.head, keys.versions, keys.clients,
                    keys.jobs, keys.pinned, keys.last_jobs, keys.cohort,
                    *map(keys.asks, keepers), *map(keys.says, keepers),
                ],
                [
                    self.token, stopped_because, int(failed),
                    keys.model_prefix, model_chunks + 1,  # and the chunk of the signature
                    keys.site_prefix, keys.updates_prefix, *versions,
                ],
            )
        )  # fmt: skip
        for some in _slices(self.all_keys(), SITES_AT_ONCE):
            pipe = self.redis.pipeline(transaction=False)
            for key in some:
                pipe.expire(key, max(1, round(retention_seconds)))
            pipe.execute()

    def restore(self, version: int, job_number: int, ledger: Iterable[Mapping[str, Any]]) -> None:
        """Write back a checkpoint's ledger and counters; `publish` of `version` then makes it the head."""
        records = list(ledger)
        pipe = self.redis.pipeline(transaction=True)
        pipe.delete(self.keys.ledger, self.keys.counts)
        for record in records:
            pipe.xadd(self.keys.ledger, {"record": pack_record(record)})
        if fields := counts_of_all(records):
            pipe.hset(self.keys.counts, mapping=cast(Any, fields))
        if self.identity:
            self.identity.remember(records)
        pipe.execute()
        self.redis.hset(self.keys.head, mapping={"version": version - 1, "job_number": job_number})

    def clear(self) -> int:
        """Delete the run's keys, except the leader's, and its jobs and queues in RQ; returns the number of keys.

        The leader's key stays, so that no fencing token is issued twice. The caller leads the run. Raises Fenced.
        """
        from fedqueue.transport import rq_jobs  # not by commands that only show a run

        keys = self.keys
        found = [key for key in self.all_keys() if key != keys.leader.encode()]
        self.renew_lead(CLEAR_SECONDS)
        for client in self.clients():
            rq_jobs.delete_queue(self.redis, keys.queue(client))
        for key in found:
            self.redis.unlink(key)
        self.redis.srem(RUNS, self.run)
        return len(found)

    def forget_leader(self) -> None:
        """Delete the last key of a run that `clear` has deleted, unless a coordinator has begun it again."""
        if not self.redis.exists(self.keys.config):
            self.redis.unlink(self.keys.leader)

    def is_led(self) -> bool:
        """Whether a coordinator's lease has not ended, by the server's clock."""
        owner, expires = cast(list[bytes | None], self.redis.hmget(self.keys.leader, "owner", "expires"))
        seconds, micros = self.redis.time()
        return bool(owner) and number(expires) > seconds * 1000 + micros // 1000

    def all_keys(self) -> list[bytes]:
        """Return the names of the run's keys."""
        return [cast(bytes, key) for key in self.redis.scan_iter(match=self.keys.pattern, count=1000)]

    # Versions

    def publish(
        self,
        version: int,
        model: BlobBuffer,
        optimizer_state: BlobBuffer,
        records: Sequence[Mapping[str, Any]],
        totals: Mapping[str, Any],
        merged: Sequence[StreamEntry],
        *,
        job_number: int = 0,
        keep_payloads: bool = False,
        largest_model: int | None = None,
        largest_payload: int | None = None,
        masks: Sequence[str] = (),
    ) -> set[int]:
        """Stage a version's blobs under this leader's own keys, then commit them in one step with all that belongs.

        `model` is the encoded frame. `records` are ledger records, one for each version since the head: only the last
        of these versions is stored, because no worker could have read the others. `merged` are the stream entries of
        all updates in them, which are acknowledged. `totals` are the counters that recovery needs, and `job_number`
        is the last one in use. With `keep_payloads`, payloads of merged updates stay stored.

        `largest_model` and `largest_payload` bound the bytes of any version and of any payload where their sizes
        vary; by default both are as large as `model`. `masks` are the names (KEEPER:COHORT) of the masks that the
        versions were made with, which are kept as payloads are.

        Returns the versions that are still stored. Raises Fenced, and StoreError if the head is not the version
        before these.
        """
        keys = self.keys
        packed_records = [pack_record({**record, "token": self.token}) for record in records]
        packed_totals = pack_record(totals)
        staged = keys.staged_model(self.token), keys.staged_state(self.token)
        model_chunks, state_chunks = chunks_of(model.nbytes), chunks_of(optimizer_state.nbytes)
        first = self.begin_blob(staged[0], model, STAGED_SECONDS)
        first += self.begin_blob(staged[1], optimizer_state, STAGED_SECONDS)
        if self.identity:  # the signature is one more chunk of the model: committed and deleted with it
            envelope = self.identity.sign_version(
                version, model, optimizer_state, job_number, packed_records, packed_totals
            )
            first.append(("SET", f"{staged[0]}:{model_chunks}", envelope, "EX", STAGED_SECONDS))
            model_chunks += 1
        merged_args: list[Any] = []
        for entry in merged:
            position, client = split_entry_id(entry.id)
            merged_args += [client, position, entry.job, entry.attempt]
        answer = self.script(
            "commit",
            [keys.leader, keys.head, keys.versions, keys.ledger, keys.jobs, keys.pinned, keys.counts, keys.cohort],
            [
                self.token, version, len(packed_records), packed_totals,
                keys.job(""), keys.payload_prefix, keys.model_prefix, keys.state_prefix,
                model_chunks, state_chunks, int(keep_payloads), keys.attempt(""), keys.updates_prefix,
                chunks_of(max(largest_model or 0, model.nbytes)) + 1,  # and the chunk of the signature
                chunks_of(max(largest_payload or 0, model.nbytes)),
                SCANNED_JOBS, keys.mask_prefix, keys.kept_mask_prefix, chunks_of(largest_payload or 0), len(masks),
                *masks, *packed_records, *merged_args,
            ],
            first,
        )  # fmt: skip
        if answer[0] != 1:
            for prefix, chunks in zip(staged, (model_chunks, state_chunks), strict=True):
                for i in range(chunks):
                    self.redis.unlink(f"{prefix}:{i}")
        self._require_lead(answer[0])
        if answer[0] == -2:
            raise StoreError(
                f"version {version} of run {self.run!r} was not committed within {STAGED_SECONDS} s; check the network"
            )
        if answer[0] == 0:
            if self.has_remains():
                raise Fenced(f"Redis has lost the head of run {self.run!r}")
            raise StoreError(f"version {version} does not follow the head of run {self.run!r}; restart the coordinator")
        return set(map(int, answer[1:]))

    def pin_version(self, version: int) -> None:
        """Keep a version stored until the run ends."""
        self.redis.sadd(self.keys.pinned, version)

    def read_model(self, version: int, codec: Codec) -> Frame:
        """A version, decoded; raises as `Store.read_model`, and SignatureError for one that was not signed."""
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
        """Prefetch the payloads of these updates in the given order, in which they will be merged."""
        if not codec.zstd:  # with zstd, each payload states its own size
            updates = [entry for entry in entries if entry.kind == "update"]
            self.ahead.expect((self.keys.payload(entry.job, entry.attempt), codec.nbytes) for entry in updates)

    def read_optimizer_state(self, version: int) -> bytes:
        """The server optimizer's state after `version`; raises StoreError if a chunk is missing."""
        chunks = int(cast(bytes | None, self.redis.hget(self.keys.head, "state_chunks")) or 0)
        parts = [cast(bytes | None, self.redis.get(f"{self.keys.state(version)}:{i}")) for i in range(chunks)]
        if None in parts:
            raise StoreError(f"the server optimizer's state of version {version} is incomplete")
        return b"".join(cast(list[bytes], parts))

    # Jobs

    def dispatch(self, order: Order, packed: bytes, record: RqJobRecord, number: int, lease_seconds: float) -> None:
        """Open a job and put it into its client's RQ queue, in one round trip; repeating it changes nothing.

        `packed` is the order as `pack_order` returns it, and `number` the job's number. Raises Fenced if another
        coordinator leads; then the job is removed from the queue. It was not open, so no worker could begin it.
        """
        keys, job = self.keys, order.job
        opening = (
            "dispatch",
            [
                keys.leader, keys.job(job), keys.attempt(job), keys.jobs, keys.site(order.client), keys.head,
                keys.clients, keys.last_jobs,
            ],
            [self.token, job, order.client, packed, round(lease_seconds * 1000), number],
        )  # fmt: skip
        led, enqueued = self.scripts([opening, _enqueue_call(record)])
        if led == -1 and enqueued:
            self.redis.lrem(record.queue, 0, job)
            self.redis.delete(record.key)
        self._require_lead(led)

    def enqueue(self, record: RqJobRecord) -> None:
        """Put an open job into its RQ queue again, unless RQ still has a record of it."""
        self.scripts([_enqueue_call(record)])

    def pack_order(self, order: Order) -> bytes:
        """The order as it is stored and sent: in a signed run, an envelope."""
        return self.identity.sign_order(order) if self.identity else order.pack()

    def unpack_order(self, data: bytes) -> Order:
        """The inverse of `pack_order`; raises WireError for an order that this coordinator did not give."""
        return self.identity.open_order(data) if self.identity else read(Order, data)

    def unstarted_orders(self) -> list[Order]:
        """The orders of open jobs that no worker has begun; an invalid order is logged and skipped."""
        orders = []
        for job in self.jobs():
            if job.state == JobState.OPEN and job.attempt == 0:
                try:
                    orders.append(self.unpack_order(job.order))
                except WireError as error:
                    log.warning("ignoring invalid order; its job ends by its lease", job=job.job, error=str(error))
        return orders

    def job_number(self) -> int:
        """The number of the last job that was dispatched."""
        return int(cast(bytes | None, self.redis.hget(self.keys.head, "job_number")) or 0)

    def last_jobs(self) -> dict[str, int]:
        """Client → the number of its last job."""
        numbers = cast(dict[bytes, bytes], self.redis.hgetall(self.keys.last_jobs))
        return {client.decode(): int(number) for client, number in numbers.items()}

    def jobs(self) -> list[OpenJob]:
        """Every job that has been dispatched and has no ledger record yet."""
        names = sorted(job.decode() for job in cast(set[bytes], self.redis.smembers(self.keys.jobs)))
        pipe = self.redis.pipeline(transaction=False)
        for job in names:
            pipe.hmget(self.keys.job(job), "client", "order")
            pipe.hmget(self.keys.attempt(job), "posted", "number")
        answers = pipe.execute()
        return [
            OpenJob(job, client.decode(), JobState.POSTED if posted else JobState.OPEN, number(attempt), order)
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
        """End a job without merging it, and append `record` to the ledger; `entry`, if given, is acknowledged.

        Returns False if the job had ended before, if `if_lapsed` and its lease has not ended, or if `unless_posted`
        and it was posted. Raises Fenced.
        """
        condition = "lapsed" if if_lapsed else "unposted" if unless_posted else "any"
        keys = self.keys
        position, client = split_entry_id(entry)
        answer = self.script(
            "close",
            [
                keys.leader, keys.job(job), keys.attempt(job), keys.jobs, keys.ledger, keys.updates(client),
                keys.counts,
            ],
            [
                self.token, job, pack_record(record), position, condition, f"{keys.payload_prefix}{job}:",
                payload_chunks, keys.site_prefix, MOST_ATTEMPTS, MOST_CHUNKS, *counts_of(record),
                record.get("client", ""),
            ],
        )  # fmt: skip
        self._require_lead(answer)
        return bool(answer)

    def is_posted(self, job: str) -> bool:
        """Whether the job's update or ending is in the stream and not acknowledged yet."""
        return bool(self.redis.hexists(self.keys.attempt(job), "posted"))

    def ack(self, entries: Sequence[tuple[str, Mapping[str, Any] | None]]) -> int:
        """Acknowledge entries that end no job, in one step, and append each one's record, if given, to the ledger.

        Returns the number of those that were not acknowledged before. Raises Fenced.
        """
        streams, args = [], []
        for entry, record in entries:
            position, client = split_entry_id(entry)
            streams.append(self.keys.updates(client))
            args += [position, pack_record(record) if record else b"", *counts_of(record or {})]
        answer = int(
            self.script("ack", [self.keys.leader, self.keys.ledger, self.keys.counts, *streams], [self.token, *args])
        )
        self._require_lead(answer)
        return answer

    def find_expired(self) -> list[str]:
        """Jobs whose lease has ended, by the server's clock.

        The lease of an attempt has also ended if another worker process serves its client by now.
        """
        keys = self.keys
        prefixes = [keys.attempt(""), keys.site_prefix, keys.job("")]
        return [job.decode() for job in self.script("find_expired", [keys.jobs], prefixes)]

    def signed_registrations(self) -> dict[str, bytes]:
        """Client → its registration as stored; absent or larger than a message: left out."""
        return self.registrations_of(self.clients())

    def registrations_of(self, clients: Sequence[str]) -> dict[str, bytes]:
        """As `signed_registrations`, of some clients."""
        found: dict[str, bytes] = {}
        for some in _slices(clients, SITES_AT_ONCE):
            records = self.script("registrations", [self.keys.site(client) for client in some], [MAX_MESSAGE])
            found.update((client, record) for client, record in zip(some, records, strict=True) if record is not None)
        return found

    def client_leases(self, clients: Sequence[str], most_seconds: float = 3600.0) -> dict[str, float]:
        """Client → seconds that its lease still lasts by the server's clock, at most `most_seconds`; 0 if it has ended.

        A client without a lease is left out.
        """
        arguments = [self.keys.site_prefix, round(most_seconds * 1000)]
        left: list[int] = []
        for some in _slices(clients, SITES_AT_ONCE):
            left += self.script("client_leases", [self.keys.clients], [*arguments, *some])
        return {client: ms / 1000 for client, ms in zip(clients, left, strict=True) if ms >= 0}

    def last_report(self, job: str, client: str) -> LastReport:
        """What the records say about a job of the client whose lease has ended."""
        begun, alive, stalled, phase = self.script("last_report", [self.keys.attempt(job), self.keys.site(client)], [])
        name = phase.decode(errors="replace")  # a worker wrote it
        return LastReport(bool(begun), bool(alive), bool(stalled), Phase(name) if name in set(Phase) else None)

    def expire_clients(self, clients: Sequence[str]) -> list[str]:
        """Release clients whose workers' leases have ended; returns them without those whose lease was renewed."""
        expired = self.script("expire_clients", [self.keys.site(client) for client in clients], [])
        return [client for client, gone in zip(clients, expired, strict=True) if gone]

    def served(self, clients: Sequence[str]) -> set[str]:
        """Those of the clients that a worker serves."""
        return {client for client, left in self.client_leases(clients).items() if left > 0}

    # Keepers

    def ask(self, keepers: Sequence[str], kind: str, bodies: Sequence[bytes]) -> list[dict[str, str]]:
        """Append asks to each keeper's stream; returns keeper → position for each of the asks."""
        pipe = self.redis.pipeline(transaction=False)
        for body in bodies:
            for keeper in keepers:
                pipe.xadd(self.keys.asks(keeper), {"kind": kind, "body": body})
        entries = iter(pipe.execute())
        return [{keeper: next(entries).decode() for keeper in keepers} for _ in bodies]

    def propose(self, keepers: Sequence[str], cohort: bytes, record: Mapping[str, Any] | None = None) -> dict[str, str]:
        """Note the signed cohort as the one under way, and ask all keepers for its masks; as `ask`. Raises Fenced.

        `record` is added to the ledger in the same step.
        """
        keys = [self.keys.leader, self.keys.cohort, self.keys.ledger, *map(self.keys.asks, keepers)]
        led, *asks = self.script("propose", keys, [self.token, cohort, pack_record(record) if record else b""])
        self._require_lead(led)
        return {keeper: entry.decode() for keeper, entry in zip(keepers, asks, strict=True)}

    def proposed(self) -> bytes:
        """The signed cohort under way; empty without any."""
        return cast(bytes | None, self.redis.get(self.keys.cohort)) or b""

    def drop_asks(self, asks: Iterable[tuple[str, str]]) -> None:
        """Delete asks, each a keeper and a position, that need no answer any more."""
        self._delete_entries((self.keys.asks(keeper), position) for keeper, position in asks)

    def drop_all_asks(self, keepers: Iterable[str]) -> None:
        """Delete every ask; the positions of later ones still rise."""
        for keeper in keepers:
            self.redis.xtrim(self.keys.asks(keeper), maxlen=0, approximate=False)

    def keeper_statement(self, keeper: str) -> bytes:
        """The signed `KeeperKey` that is stored for the keeper; empty without any."""
        return cast(bytes, self.redis.getrange(self.keys.keeper(keeper), 0, MAX_MESSAGE))

    def answers(self, after: Mapping[str, str], count: int = 256) -> list[Answer]:
        """The next answers of each keeper (→ position of the last one that was read), which are deleted."""
        streams = {self.keys.says(keeper): position for keeper, position in after.items()}
        found = by_stream(self.redis.xread(cast(Any, streams), count=count))
        answers = [
            Answer(
                stream.removeprefix(self.keys.says_prefix), entry.decode(),
                fields.get(b"kind", b"").decode(errors="replace"), fields.get(b"body", b""),
            )
            for stream, entries in found.items()
            for entry, fields in entries
        ]  # fmt: skip
        if answers:
            self._delete_entries((self.keys.says(answer.keeper), answer.position) for answer in answers)
        return answers

    def _delete_entries(self, entries: Iterable[tuple[str, str]]) -> None:
        """Delete entries, each a stream and a position, in one round trip."""
        of_stream: dict[str, list[str]] = {}
        for stream, position in entries:
            of_stream.setdefault(stream, []).append(position)
        pipe = self.redis.pipeline(transaction=False)
        for stream, positions in of_stream.items():
            pipe.xdel(stream, *positions)
        pipe.execute()

    # What workers report: test doubles of the run override these, so they are methods of the store

    def receive(self, block_seconds: float, count: int = 32) -> list[StreamEntry]:
        """The next entries, as `Inbox.receive`."""
        return self._inbox.receive(block_seconds, count)

    def read_first(self, clients: Container[str]) -> None:
        """Let `receive` read the streams of `clients` before others, as `Inbox.read_first`."""
        self._inbox.read_first(clients)

    def sweep(self, count: int = 32) -> list[StreamEntry]:
        """The next entries of every stream, as `Inbox.sweep`."""
        return self._inbox.sweep(count)

    def sweep_some(self, clients: Iterable[str], count: int = 32) -> list[StreamEntry]:
        """The next entries of the streams of `clients` and of some others, as `Inbox.sweep_some`."""
        return self._inbox.sweep_some(clients, count)

    def unacknowledged(self, clients: Iterable[str] | None = None) -> list[StreamEntry]:
        """The entries that no script has acknowledged, as `Inbox.unacknowledged`."""
        return self._inbox.unacknowledged(clients)

    def report(self, kind: str, body: bytes) -> None:
        """Append an entry to the coordinator's own stream, such as a finished evaluation."""
        if self.identity:
            body = self.identity.sign_evaluation(body)
        pipe = self.redis.pipeline(transaction=False)
        pipe.xadd(self.keys.updates(""), {"kind": kind, "body": body})
        pipe.publish(self.keys.wakeup, self.keys.updates(""))
        pipe.execute()

    def _require_lead(self, answer: int) -> None:
        if answer == -1:
            raise Fenced(f"another coordinator leads run {self.run!r} by now; nothing was written")


def counts_of(record: Mapping[str, Any]) -> tuple[str, str]:
    """The field of `Keys.counts` that a record increases, and the field that becomes the record; '' for neither."""
    kind = record.get("kind")
    counted = f"{kind}:{record.get('reason', '')}" if kind in ("rejected", "abandoned") else ""
    return counted, "failure" if record.get("error") else "evaluation" if kind == "evaluation" else ""


def counts_of_all(records: Iterable[Mapping[str, Any]]) -> dict[str, int | bytes]:
    """The content of `Keys.counts` after all these records."""
    counts: Counter[str] = Counter()
    newest: dict[str, bytes] = {}
    for record in records:
        counts.update(f"merged:{line['client']}" for line in record.get("merged", ()))
        counted, kept = counts_of(record)
        counts.update([counted] if counted else [])
        newest.update({kept: pack_record(record)} if kept else {})
    return {**counts, **newest}


def _slices(names: Sequence[T], length: int) -> Iterator[Sequence[T]]:
    for first in range(0, len(names), length):
        yield names[first : first + length]


def _enqueue_call(record: RqJobRecord) -> Call:
    return "enqueue", [record.key, record.queue], [record.job, *record.fields]
