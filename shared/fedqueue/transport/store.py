"""One run in Redis, as anybody with access may read it; coordinators and workers have stores of their own on top."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import redis

from fedqueue.errors import RunNotFound, StoreError, WireError
from fedqueue.protocol.keys import RUNS, Keys
from fedqueue.protocol.messages import Registration, read
from fedqueue.protocol.msgpack import MAX_MESSAGE, MAX_RECORD, unpack_record
from fedqueue.protocol.post_result import REFUSALS
from fedqueue.protocol.run_info import RunInfo
from fedqueue.protocol.signed_envelope import unverified_body
from fedqueue.tensors.blobs import BlobBuffer, chunks_of
from fedqueue.transport.blob_store import BlobStore
from fedqueue.transport.lua_scripts import ScriptRunner

if TYPE_CHECKING:  # torch and numpy, which a command that only shows a run does without
    from fedqueue.tensors.codec import Codec
    from fedqueue.tensors.frame import Frame


@dataclass(frozen=True)
class RunCounts:
    """What the records of a ledger add up to."""

    merged_by: dict[str, int]
    """Client → its merged updates."""
    rejected: dict[str, int]
    """Reason → rejected updates."""
    abandoned: dict[str, int]
    """Reason → abandoned jobs."""
    evaluation: dict[str, Any] | None
    """The newest record of an evaluation."""
    failure: dict[str, Any] | None
    """The newest record with an error: of a job, of a client that cannot load its data, or of an evaluation."""


class Store(BlobStore, ScriptRunner):
    """One run in one Redis database."""

    def __init__(self, client: redis.Redis, run: str) -> None:
        self.redis = client
        self.run = run
        self.keys = Keys(run)

    # The run

    def info(self) -> RunInfo:
        """A snapshot of the run; raises RunNotFound if Redis has no run of this name."""
        pipe = self.redis.pipeline(transaction=True)
        pipe.hgetall(self.keys.config)
        pipe.hgetall(self.keys.head)
        pipe.hget(self.keys.leader, "owner")
        config, head, leader = pipe.execute()
        if b"config" not in config:
            raise RunNotFound(self.run)
        return RunInfo(
            run=self.run,
            state=config[b"state"].decode(),
            config=plain_json(config[b"config"]),
            manifest=config[b"manifest"],
            version=int(head.get(b"version", -1)),
            totals=unpack_record(head[b"totals"]) if b"totals" in head else {},
            stopped_because=config.get(b"stopped_because", b"").decode(),
            epoch=int(config.get(b"epoch", 0)),
            leader=(leader or b"").decode(),
            descriptor=config.get(b"descriptor", b""),
            config_digest=hashlib.sha256(config[b"config"]).hexdigest(),
            failed=config.get(b"failed") == b"1",
        )

    def ledger(self) -> list[dict[str, Any]]:
        """Every record of the ledger, oldest first."""
        entries = cast(list[tuple[bytes, dict[bytes, bytes]]], self.redis.xrange(self.keys.ledger))
        return [unpack_record(fields[b"record"]) for _, fields in entries]

    def newest_records(self, count: int) -> list[dict[str, Any]]:
        """The last `count` records of the ledger, oldest first."""
        entries = cast(list[tuple[bytes, dict[bytes, bytes]]], self.redis.xrevrange(self.keys.ledger, count=count))
        return [unpack_record(fields[b"record"]) for _, fields in reversed(entries)]

    def counts(self) -> RunCounts:
        """What the ledger's records add up to, kept as they are appended: its time does not depend on their number."""
        fields = cast(dict[bytes, bytes], self.redis.hgetall(self.keys.counts))
        counts: dict[bytes, dict[str, int]] = {b"merged": {}, b"rejected": {}, b"abandoned": {}}
        for field, value in sorted(fields.items()):
            kind, colon, name = field.partition(b":")
            if colon and kind in counts:
                counts[kind][name.decode()] = number(value)
        newest = (unpack_record(fields[kind]) if kind in fields else None for kind in (b"evaluation", b"failure"))
        return RunCounts(*counts.values(), *newest)

    def open_jobs(self) -> int:
        """Number of jobs that are dispatched and not posted."""
        pipe = self.redis.pipeline(transaction=False)
        for job in cast(set[bytes], self.redis.smembers(self.keys.jobs)):
            pipe.hexists(self.keys.attempt(job.decode()), "posted")
        return pipe.execute().count(False)

    def waiting(self) -> str:
        """What keeps the run from going on, as its leader last said; an empty string for nothing."""
        return (cast(bytes | None, self.redis.hget(self.keys.leader, "waiting")) or b"").decode(errors="replace")

    # Clients

    def clients(self) -> list[str]:
        """The clients that the run knows, whether or not a worker serves them."""
        return sorted(client.decode() for client in cast(set[bytes], self.redis.smembers(self.keys.clients)))

    def sites(self) -> tuple[list[str], dict[str, int]]:
        """What `alive_clients` and `refused` return, with two commands for each client and four round trips in all."""
        seconds, micros = self.redis.time()
        now, clients = seconds * 1000 + micros // 1000, self.clients()
        fields = [f"refused:{reason}" for reason in REFUSALS]
        pipe = self.redis.pipeline(transaction=False)
        for client in clients:
            pipe.hstrlen(self.keys.site(client), "alive")
        sizes = pipe.execute()
        for client, size in zip(clients, sizes, strict=True):
            # A worker wrote the field: a value that is larger than a message is left out.
            pipe.hmget(self.keys.site(client), ["alive" if 0 < size <= MAX_MESSAGE else "", *fields])
        rows = pipe.execute()
        alive = [client for client, row in zip(clients, rows, strict=True) if number(row[0]) > now]
        return alive, _refusals([row[1:] for row in rows])

    def alive_clients(self) -> list[str]:
        """The clients whose worker's lease has not ended, by the server's clock."""
        seconds, micros = self.redis.time()
        now = seconds * 1000 + micros // 1000
        return sorted(client for client, alive in self._of_each_site("alive").items() if number(alive) > now)

    def registrations(self) -> dict[str, dict[str, Any]]:
        """Client → its registration, signed or not, without verification: to show, not to act on.

        A value that is not a registration of that client is left out.
        """
        found = {}
        for client, record in self.signed_registrations().items():
            with contextlib.suppress(WireError):
                registration = read(Registration, unverified_body(record))
                if registration.client == client:
                    found[client] = registration.model_dump()
        return found

    def signed_registrations(self) -> dict[str, bytes]:
        """Client → its registration as stored: in a signed run, an envelope."""
        return self._of_each_site("registration")

    def refused(self) -> dict[str, int]:
        """Reason → number of claims and posts that a script rejected; the jobs themselves are counted elsewhere."""
        pipe = self.redis.pipeline(transaction=False)
        fields = [f"refused:{reason}" for reason in REFUSALS]
        for client in self.clients():
            pipe.hmget(self.keys.site(client), fields)
        return _refusals(pipe.execute())

    def _of_each_site(self, field: str) -> dict[str, bytes]:
        """Client → the field of its site record, which a worker wrote; absent or larger than a message: left out."""
        clients = self.clients()
        pipe = self.redis.pipeline(transaction=False)
        for client in clients:
            pipe.hstrlen(self.keys.site(client), field)
        wanted = [client for client, size in zip(clients, pipe.execute(), strict=True) if 0 < size <= MAX_MESSAGE]
        for client in wanted:
            pipe.hget(self.keys.site(client), field)
        return {c: value for c, value in zip(wanted, pipe.execute(), strict=True) if value is not None}

    # Versions

    def stored_versions(self) -> list[int]:
        """The versions whose chunks are stored, oldest first."""
        return [int(v) for v in cast(list[bytes], self.redis.zrange(self.keys.versions, 0, -1))]

    def read_wire(self, version: int, codec: Codec) -> BlobBuffer:
        """A version as stored, encoded; raises as `blob_size` and `read_blob`."""
        import numpy as np

        wire = np.empty(self.blob_size(self.keys.model(version), codec), np.uint8)
        self.read_blob(self.keys.model(version), wire)
        return wire

    def read_model(self, version: int, codec: Codec) -> Frame:
        """A version as workers get it, decoded; raises as `read_wire`, and WireError for bytes that are no frame."""
        return codec.decode(self.read_wire(version, codec)).whole()

    def read_frozen(self, nbytes: int) -> BlobBuffer | None:
        """The model's frozen tensors, of `nbytes` bytes; None if it has none. Raises as `read_blob`."""
        import numpy as np

        if not nbytes:
            return None
        frozen = np.empty(nbytes, np.uint8)
        self.read_blob(self.keys.frozen, frozen)
        return frozen

    def read_version_signature(self, version: int, model_bytes: int) -> bytes:
        """The envelope that signs a version of `model_bytes` bytes; empty if the version is not signed."""
        return cast(bytes, self.redis.getrange(self.signature_key(version, model_bytes), 0, MAX_MESSAGE))

    def signature_key(self, version: int, model_bytes: int) -> str:
        """The key of a version's envelope, which is stored as one more chunk, after the version's last."""
        return f"{self.keys.model(version)}:{chunks_of(model_bytes)}"


def _refusals(rows: Sequence[Sequence[bytes | None]]) -> dict[str, int]:
    """Reason → sum over the clients' rows, each in the order of REFUSALS; without those that are 0."""
    counts = {str(reason): sum(number(row[i]) for row in rows) for i, reason in enumerate(REFUSALS)}
    return {reason: count for reason, count in counts.items() if count}


def number(text: bytes | None) -> int:
    """A number that another process wrote; 0 for a missing or malformed one."""
    try:
        return int(text or 0)
    except ValueError:
        return 0


def plain_json(data: bytes) -> dict[str, Any]:
    """The configuration of a run; raises StoreError unless it is a JSON object of at most MAX_RECORD bytes."""
    try:
        if len(data) <= MAX_RECORD and isinstance(value := json.loads(data), dict):
            return value
    except (ValueError, RecursionError):
        pass
    raise StoreError(f"the configuration of the run, {len(data)} bytes, is no JSON object of at most {MAX_RECORD}")


def list_runs(client: redis.Redis) -> list[str]:
    """The runs on this server that have not expired."""
    names = sorted(name.decode() for name in cast(set[bytes], client.smembers(RUNS)))
    return [name for name in names if client.exists(Keys(name).config)]
