"""All access to Redis: what both sides read, and how blobs are stored. The rest: `coordinator_store`, `worker_store`.

A step that must be atomic is one Lua script in `scripts/`, named after what it does; its header says its keys and
arguments. Blobs span chunks of `CHUNK` bytes, so that no value comes near Redis's limit of 512 MB.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import redis

from fedqueue.errors import BlobMissing, RunNotFound, StoreError, WireError
from fedqueue.protocol.keys import RUNS, Keys
from fedqueue.protocol.messages import MAX_MESSAGE, MAX_RECORD, Registration, read, unpack_record
from fedqueue.protocol.signed_envelope import unverified_body
from fedqueue.transport.zero_copy import Answer, Command, Part, checked, exchange, get_parts

if TYPE_CHECKING:  # torch and numpy, which a command that shows a run can do without
    import numpy as np
    import numpy.typing as npt

    from fedqueue.tensors.codec import Codec
    from fedqueue.tensors.frame import Frame

CHUNK = 32 * 1024 * 1024  # bytes
READ = 4 * 1024 * 1024  # bytes of a chunk that are asked for at once: all that the server holds twice
_SCRIPTS = resources.files("fedqueue.transport").joinpath("scripts")
BlobBuffer: TypeAlias = "npt.NDArray[np.uint8]"
Call: TypeAlias = tuple[str, list[str], list[Any]]
"""A script's name, its keys and its arguments."""


@dataclass(frozen=True)
class RunInfo:
    """What Redis knows of a run at one moment."""

    run: str
    state: str  # "running" or "ended"
    config: dict[str, Any]
    manifest: bytes
    version: int
    totals: dict[str, Any]
    stopped_because: str
    epoch: int
    leader: str
    """Owner of the lead, or an empty string."""
    descriptor: bytes = b""
    """Sealed by the coordinator, where it signs; see `signing.Charter`."""
    config_digest: str = ""
    """SHA-256 of the configuration's text."""


REFUSALS = ("closed", "attempt", "replayed", "payload", "old_epoch")
"""Why a claim or a post was refused at the door."""


def number(text: bytes | None) -> int:
    """A number that another process wrote, or 0 for what is none."""
    try:
        return int(text or 0)
    except ValueError:
        return 0


@cache
def script_digest(name: str) -> str:
    """What Redis calls `scripts/NAME.lua`: SHA-1, in hex."""
    source = _SCRIPTS.joinpath(f"{name}.lua").read_text(encoding="utf-8")
    return hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest()


def chunks_of(nbytes: int) -> int:
    """How many chunks a blob of that size has."""
    return -(-nbytes // CHUNK)


class Store:
    """One run in one Redis database."""

    def __init__(self, client: redis.Redis, run: str) -> None:
        self.redis = client
        self.run = run
        self.keys = Keys(run)

    def script(
        self, name: str, keys: list[str], args: list[Any], first: Sequence[Command] = (), then: Sequence[Command] = ()
    ) -> Any:
        """Run `scripts/NAME.lua`, atomically. `first` and `then` are commands that travel before and behind it."""
        return self.scripts([(name, keys, args)], first, then)[-1]

    def scripts(self, calls: Sequence[Call], first: Sequence[Command] = (), then: Sequence[Command] = ()) -> list[Any]:
        """Run several, each atomically, in one exchange; returns what they answer. Raises the first error among all.

        Nobody looks at what `then` answers. A server that has been restarted knows no script. Who may load them does
        so here, and all is done again; a worker under access rules may not, gets NoScriptError, and waits for its
        coordinator (`outage.py`).
        """
        own = [("EVALSHA", script_digest(name), len(keys), *keys, *args) for name, keys, args in calls]
        commands, wanted = [*first, *own, *then], slice(len(first) + len(own))
        try:
            answers = checked(exchange(self.redis, commands)[wanted])
        except redis.exceptions.NoScriptError as missing:
            try:
                self.load_scripts()
            except redis.exceptions.NoPermissionError:
                raise missing from None
            answers = checked(exchange(self.redis, commands)[wanted])
        return answers[len(first) :]

    def load_scripts(self) -> None:
        """Load every script into the server's cache, those that only workers run too."""
        pipe = self.redis.pipeline(transaction=False)
        for file in _SCRIPTS.iterdir():
            if file.name.endswith(".lua"):
                pipe.script_load(file.read_text(encoding="utf-8"))
        pipe.execute()

    # Blobs

    def write_blob(self, prefix: str, buffer: BlobBuffer, seconds: int | None = None) -> int:
        """Store `buffer` in chunks at `prefix:0`, `prefix:1`, …; they expire after `seconds`. Returns their number."""
        chunks = chunks_of(buffer.nbytes)
        for i in range(chunks):
            self.redis.set(f"{prefix}:{i}", memoryview(buffer[i * CHUNK : (i + 1) * CHUNK]), ex=seconds)  # type: ignore[arg-type]
        return chunks

    def begin_blob(self, prefix: str, buffer: BlobBuffer, seconds: int) -> list[Command]:
        """As `write_blob`; a buffer of one chunk is not written yet: the command that does travels with a script."""
        if chunks_of(buffer.nbytes) > 1:
            self.write_blob(prefix, buffer, seconds)
            return []
        return [("SET", f"{prefix}:0", memoryview(buffer), "EX", seconds)] if buffer.nbytes else []  # type: ignore[arg-type]

    def read_blob(self, prefix: str, into: BlobBuffer) -> None:
        """Fill `into` from the chunks at `prefix`.

        Raises BlobMissing for a chunk that is not there, and StoreError for one of another size.
        """
        self.read_span(prefix, 0, into, into.nbytes)

    def read_span(self, prefix: str, start: int, into: BlobBuffer, whole: int) -> None:
        """Fill `into` with what begins at byte `start` of a blob of `whole` bytes; raises as `read_blob`."""
        done = 0
        while done < into.nbytes:
            number, offset = divmod(start + done, CHUNK)
            place = into[done : done + min(READ, CHUNK - offset)]
            chunk = min(CHUNK, whole - number * CHUNK)
            part = _part(f"{prefix}:{number}", offset, place, chunk)
            _check(part, get_parts(self.redis, [part])[0], chunk)
            done += place.nbytes

    def read_signed_version(self, version: int, into: BlobBuffer) -> bytes:
        """Fill `into` with a version, as `read_blob`; returns its seal, which comes with it where both are small."""
        if into.nbytes > READ:
            self.read_blob(self.keys.model(version), into)
            return self.read_version_signature(version, into.nbytes)
        part = _part(f"{self.keys.model(version)}:0", 0, into, into.nbytes)
        got, envelope = get_parts(self.redis, [part, Part(self._seal(version, into.nbytes), 0, MAX_MESSAGE)])
        _check(part, got, into.nbytes)
        return cast(bytes, envelope)

    def blob_size(self, prefix: str, codec: Codec) -> int:
        """How many bytes a frame has that was stored at `prefix`; where they vary, it says so itself.

        Raises BlobMissing where there is none, and StoreError where it claims a size that none has.
        """
        if not codec.zstd:
            return codec.nbytes
        from fedqueue.tensors.zstd import PREFIX, length

        claimed = length(cast(bytes, self.redis.getrange(f"{prefix}:0", 0, PREFIX - 1)))
        if not claimed:
            raise BlobMissing(f"{prefix}:0")
        if not codec.accepts(claimed):
            raise StoreError(f"{prefix} claims {claimed} bytes, at most {codec.largest} are possible")
        return claimed

    # What anybody may read

    def info(self) -> RunInfo:
        """Raises RunNotFound where there is no such run."""
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
        )

    def clients(self) -> list[str]:
        """The clients that the run knows, whether or not somebody serves them."""
        return sorted(client.decode() for client in cast(set[bytes], self.redis.smembers(self.keys.clients)))

    def alive_clients(self) -> list[str]:
        """Clients whose aliveness has not run out, by the server's clock."""
        seconds, micros = self.redis.time()
        now = seconds * 1000 + micros // 1000
        return sorted(client for client, alive in self._of_each_site("alive").items() if number(alive) > now)

    def registrations(self) -> dict[str, dict[str, Any]]:
        """What each client said of itself, whether it was signed or not: to show, not to act upon.

        One that is no registration of that client is left out.
        """
        found = {}
        for client, record in self.signed_registrations().items():
            with contextlib.suppress(WireError):
                registration = read(Registration, unverified_body(record))
                if registration.client == client:
                    found[client] = registration.model_dump()
        return found

    def signed_registrations(self) -> dict[str, bytes]:
        """The same as they lie there, each with its signature where it has one."""
        return self._of_each_site("registration")

    def read_version_signature(self, version: int, model_bytes: int) -> bytes:
        """What its coordinator signed of a version: it lies behind the last chunk. Empty where there is nothing."""
        return cast(bytes, self.redis.getrange(self._seal(version, model_bytes), 0, MAX_MESSAGE))

    def _seal(self, version: int, model_bytes: int) -> str:
        return f"{self.keys.model(version)}:{chunks_of(model_bytes)}"

    def open_jobs(self) -> int:
        """How many jobs are dispatched and not posted."""
        pipe = self.redis.pipeline(transaction=False)
        for job in cast(set[bytes], self.redis.smembers(self.keys.jobs)):
            pipe.hexists(self.keys.attempt(job.decode()), "posted")
        return pipe.execute().count(False)

    def refused(self) -> dict[str, int]:
        """Posts refused at the door, by reason; their jobs are counted elsewhere."""
        pipe = self.redis.pipeline(transaction=False)
        fields = [f"refused:{reason}" for reason in REFUSALS]
        for client in self.clients():
            pipe.hmget(self.keys.site(client), fields)
        rows = pipe.execute()
        counts = {reason: sum(number(row[i]) for row in rows) for i, reason in enumerate(REFUSALS)}
        return {reason: count for reason, count in counts.items() if count}

    def _of_each_site(self, field: str) -> dict[str, bytes]:
        """Client → the field of its site, where there is one no larger than a message: a worker wrote it."""
        clients = self.clients()
        pipe = self.redis.pipeline(transaction=False)
        for client in clients:
            pipe.hstrlen(self.keys.site(client), field)
        wanted = [client for client, size in zip(clients, pipe.execute(), strict=True) if 0 < size <= MAX_MESSAGE]
        for client in wanted:
            pipe.hget(self.keys.site(client), field)
        return {c: value for c, value in zip(wanted, pipe.execute(), strict=True) if value is not None}

    def ledger(self) -> list[dict[str, Any]]:
        """Every record of the ledger, oldest first."""
        entries = cast(list[tuple[bytes, dict[bytes, bytes]]], self.redis.xrange(self.keys.ledger))
        return [unpack_record(fields[b"record"]) for _, fields in entries]

    def stored_versions(self) -> list[int]:
        return [int(v) for v in cast(list[bytes], self.redis.zrange(self.keys.versions, 0, -1))]

    def read_wire(self, version: int, codec: Codec) -> BlobBuffer:
        """A version as it is stored; raises as `read_blob` and `blob_size`."""
        import numpy as np

        wire = np.empty(self.blob_size(self.keys.model(version), codec), np.uint8)
        self.read_blob(self.keys.model(version), wire)
        return wire

    def read_model(self, version: int, codec: Codec) -> Frame:
        """A version as workers get it; raises WireError, too, where it is none."""
        return codec.decode(self.read_wire(version, codec)).whole()


def _part(key: str, start: int, place: BlobBuffer, chunk: int) -> Part:
    """What is read at once of a chunk of that size. At its end one byte more is asked for: it tells a larger one."""
    end = start + place.nbytes
    return Part(key, start, end - (end < chunk), memoryview(place))  # type: ignore[arg-type]


def _check(part: Part, got: Answer, whole: int) -> None:
    """Raises BlobMissing where there is nothing, StoreError for other than was wanted of a chunk of `whole` bytes."""
    if got is None:
        return
    if not got and not part.start:
        raise BlobMissing(part.key)
    more = " or more" if part.into is not None and len(got) > part.into.nbytes else ""
    raise StoreError(f"{part.key} has {part.start + len(got)}{more} bytes, expected {whole}")


def plain_json(data: bytes) -> dict[str, Any]:
    """The configuration of a run, as any JSON object; raises StoreError for what is none or is too large."""
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
