"""`fedqueue audit`: holds what a run wrote down against the invariants (PROTOCOL.md) and says which do not hold.

It reads ledger, job records and streams of a run in Redis, or the results that a run left in a folder, and where every
payload was kept (`ledger.keep_payloads`) it replays the run from version 0. What is signed it verifies.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from fedqueue.config.loading import parse_config
from fedqueue.errors import BlobMissing, RunNotFound, StoreError
from fedqueue.protocol.keys import job_without_tag
from fedqueue.protocol.messages import unpack_record
from fedqueue.protocol.stream_entry import StreamEntry
from fedqueue.tensors.codec import downward
from fedqueue.tensors.frame import Manifest
from fedqueue.transport.store import list_runs
from fedqueue_coordinator.operator.audit.replay import REPLAY_FOLDER, Replay, replay_folder, replay_store
from fedqueue_coordinator.operator.audit.signatures import Signatures, verify_signatures
from fedqueue_coordinator.operator.run_locations import finished_runs, servers
from fedqueue_coordinator.service.coordinator_store import CoordinatorStore

LedgerRecord = Mapping[str, Any]
READ_ATTEMPTS = 100  # attempts to read a run that goes on at one moment of it


@dataclass(frozen=True)
class Check:
    """One invariant: `problems` is empty where it holds; `skipped` says why it could not be checked."""

    name: str
    says: str
    problems: Sequence[str]
    skipped: str = ""


@dataclass(frozen=True)
class AuditInput:
    """What a run wrote down."""

    run: str
    ledger: Sequence[LedgerRecord]
    dispatched: int
    """Job numbers given out, over all epochs."""
    unfinished: Mapping[str, str]
    """Job → state (open or posted), for those without an ending."""
    posted_entries: Sequence[str] | None
    """Jobs that the updates stream still has an update or ending of; None where there is no stream any more."""
    head: int
    replay: Replay | None
    own_code: bool = False
    """There is no replay, because the configuration in Redis names code, and what is in Redis must not run here."""
    signatures: Signatures | None = None
    """None for the results in a folder: nothing there is signed."""


def audit(audit_input: AuditInput) -> list[Check]:
    """Every invariant that the books can show."""
    endings = list(_endings(audit_input.ledger))
    open_, waiting = audit_input.unfinished, audit_input.posted_entries or ()
    times = Counter(job for job, _ in endings)
    merged = Counter(job for job, ending in endings if ending == "merged")
    return [
        Check(
            "I1", "every job ends in exactly one of merged, rejected, abandoned",
            [
                *(f"job {job} ended {n} times" for job, n in times.items() if n > 1),
                *(f"job {job} has ended and is still {open_[job]}" for job in times if job in open_),
                *_vanished(audit_input, set(times)),
            ],
        ),
        Check(
            "I2", "an update is merged at most once, and none that was acknowledged waits",
            [
                *(f"job {job} was merged {n} times" for job, n in merged.items() if n > 1),
                *(f"job {job} has ended, and an entry of it waits" for job in waiting if job in times),
                *_not_in_stream(audit_input),
            ],
            "" if audit_input.posted_entries is not None else "the stream is gone: the ledger alone was checked",
        ),
        Check("I3", "versions rise by one from 1 to the head", _gaps(audit_input)),
        _replayed(audit_input),
        Check("I4", "one coordinator commits at a time: fencing tokens never fall", _tokens(audit_input.ledger)),
        _signed(audit_input.signatures),
    ]  # fmt: skip


def read_audit_input(place: str, url: str, keys: Path = Path("keys")) -> AuditInput:
    """The books of the run named `place`, or of the results in the folder `place`; raises RunNotFound.

    `keys` is the folder that may have the coordinator's public key.
    """
    if (Path(place) / "ledger.jsonl").exists():
        return _books_of_folder(Path(place))
    for server in servers(url):
        if place in list_runs(server.client):
            return _books_of_store(CoordinatorStore(server.client, place, owner="audit"), keys)
    if place in finished_runs():
        return _books_of_folder(finished_runs()[place])
    raise RunNotFound(place)


def _books_of_store(store: CoordinatorStore, keys: Path) -> AuditInput:
    """Raises StoreError where a run that goes on could not be read at one moment of it."""
    for _ in range(READ_ATTEMPTS):
        with contextlib.suppress(BlobMissing):  # the head was replaced before it was read
            if audit_input := _read_store(store, keys):
                return audit_input()
    raise StoreError(f"run {store.run!r} moves on faster than it can be read: audit it again, or once it has ended")


def _read_store(store: CoordinatorStore, key_folder: Path) -> Callable[[], AuditInput] | None:
    """What changes while a run goes on, in one transaction; the replay, of what does not, is left to the caller.

    None where the run went on between the question what there is to read and the reading.
    """
    info = store.info()
    config = parse_config(info.config)
    own_code = config.ledger.keep_payloads and config.aggregation.own
    replayable = config.ledger.keep_payloads and not own_code and not info.epoch  # an epoch begins without payloads
    manifest = Manifest.unpack(info.manifest)
    frame = store.read_model(info.version, downward(config.compression, manifest)) if replayable else None
    keys = store.keys
    names = [name.decode() for name in cast(set[bytes], store.redis.smembers(keys.jobs))]
    streams = ["", *store.clients()]
    pipe = store.redis.pipeline(transaction=True)
    pipe.hmget(keys.head, "version", "job_number")
    pipe.smembers(keys.jobs)
    pipe.scard(keys.clients)
    pipe.xrange(keys.ledger)
    for job in names:
        pipe.hget(keys.attempt(job), "posted")
    for client in streams:
        pipe.xrange(keys.updates(client))
    (version, dispatched), jobs, clients, ledger, *rest = pipe.execute()
    if {job.decode() for job in jobs} - set(names) or clients >= len(streams) or int(version) != info.version:
        return None
    states = {job: "posted" if posted else "open" for job, posted in zip(names, rest, strict=False)}
    entries = [StreamEntry.from_fields("", entry) for stream in rest[len(names) :] for entry in stream]
    records = [unpack_record(fields[b"record"]) for _, fields in ledger]
    return lambda: AuditInput(
        store.run,
        records,
        int(dispatched or 0),
        {job: state for job, state in states.items() if job.encode() in jobs},
        [e.job for e in entries if e.kind in ("update", "ended")] if info.state == "running" else None,
        info.version,
        replay_store(config, store, manifest, records, frame) if frame else None,
        own_code,
        verify_signatures(store, info, records, key_folder),
    )


def _books_of_folder(folder: Path) -> AuditInput:
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    lines = (folder / "ledger.jsonl").read_text(encoding="utf-8").splitlines()
    ledger = [json.loads(line) for line in lines]
    replay = replay_folder(folder / REPLAY_FOLDER, ledger) if (folder / REPLAY_FOLDER).exists() else None
    return AuditInput(summary["run"], ledger, summary["jobs_dispatched"], {}, None, summary["versions"], replay)


def _endings(ledger: Iterable[LedgerRecord]) -> Iterable[tuple[str, str]]:
    """Job and how it ended; a rejected entry of no job, or of one that was not open, ends none."""
    for record in ledger:
        if record["kind"] == "version":
            yield from ((line["job"], "merged") for line in record["merged"])
        elif record["kind"] == "abandoned" or (
            record["kind"] == "rejected" and record["job"] and record["reason"] != "unknown_job"
        ):
            yield record["job"], record["kind"]


def _vanished(audit_input: AuditInput, ended: set[str]) -> list[str]:
    """Job numbers that were given out and of which nothing is known: neither an ending nor an open record."""
    known = {job_without_tag(job) for job in ended | set(audit_input.unfinished)}
    problems = []
    epochs = [(0, 0), *((r["epoch"], r["job_number"]) for r in audit_input.ledger if r["kind"] == "epoch")]
    ends = [*(start for _, start in epochs[1:]), audit_input.dispatched]
    for (epoch, start), end in zip(epochs, ends, strict=True):
        mark = f"e{epoch}-" if epoch else ""
        for number in range(start + 1, end + 1):
            job = f"{audit_input.run}-{mark}{number:08d}"
            if job not in known:
                problems.append(f"job {job} was dispatched and has vanished")
    return problems


def _not_in_stream(audit_input: AuditInput) -> list[str]:
    if audit_input.posted_entries is None:
        return []
    waiting = set(audit_input.posted_entries)
    return [
        f"job {job} is posted, but no entry of it waits"
        for job, state in audit_input.unfinished.items()
        if state == "posted" and job not in waiting
    ]


def _gaps(audit_input: AuditInput) -> list[str]:
    versions = [r["version"] for r in audit_input.ledger if r["kind"] == "version"]
    problems = [f"version {b} follows {a}" for a, b in zip([0, *versions], versions, strict=False) if b != a + 1]
    if (versions[-1] if versions else 0) != audit_input.head:
        problems.append(f"the head is {audit_input.head}, the ledger's last version {versions[-1] if versions else 0}")
    return problems


def _replayed(audit_input: AuditInput) -> Check:
    says = "replaying the ledger from version 0 with the same payloads gives the same bits"
    if audit_input.own_code:
        return Check("I3", says, [], "the aggregation is code of your own: audit the folder of the run's results")
    if audit_input.replay is None:
        return Check("I3", says, [], "payloads were not kept (ledger.keep_payloads = true keeps them)")
    return Check("I3", f"{says} ({audit_input.replay.updates} updates)", audit_input.replay.problems)


def _signed(signatures: Signatures | None) -> Check:
    says = "what lies in Redis is what the coordinator signed"
    if signatures is None:
        return Check("S", says, [], "results in a folder are not signed: audit the run while Redis keeps it")
    counts = ", ".join(f"{kind} {count}" for kind, count in signatures.checked.items())
    missing = f"not verified: {signatures.unchecked}"
    return Check("S", f"{says} ({counts})" if counts else says, signatures.problems, missing)


def _tokens(ledger: Iterable[LedgerRecord]) -> list[str]:
    problems, last, epoch = [], 0, 0
    for record in ledger:
        if record["kind"] == "epoch":
            epoch, last = record["epoch"], 0  # a new Redis counts its tokens anew
        elif record["kind"] == "version":
            if record["token"] < last:
                problems.append(f"version {record['version']} of epoch {epoch}: token {record['token']} after {last}")
            last = max(last, record["token"])
    return problems


def ok(checks: Iterable[Check]) -> bool:
    return not any(check.problems for check in checks)
