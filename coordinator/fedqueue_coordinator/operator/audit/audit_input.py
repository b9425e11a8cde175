"""Reads what a run recorded, from Redis at one moment or from a folder of results, for `audit`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from fedqueue.config.loading import parse_config
from fedqueue.config.schema import Config
from fedqueue.errors import BlobMissing, RunNotFound, StoreError, WireError
from fedqueue.protocol.messages import read
from fedqueue.protocol.msgpack import unpack_record
from fedqueue.protocol.run_info import RunInfo
from fedqueue.protocol.signed_envelope import RunDescriptor, Scope, unverified_body
from fedqueue.protocol.stream_entry import StreamEntry
from fedqueue.tensors.codec import downlink_codec
from fedqueue.tensors.manifest import Manifest
from fedqueue.transport.store import list_runs
from fedqueue_coordinator.operator.audit.masked_versions import MaskedVersions, check_masked_versions
from fedqueue_coordinator.operator.audit.replay import Replay, read_archive, replay_folder, replay_store
from fedqueue_coordinator.operator.audit.signatures import Signatures, verify_signatures
from fedqueue_coordinator.operator.runs import finished_runs, reachable_servers, read_ledger, read_summary
from fedqueue_coordinator.service.coordinator_store import CoordinatorStore
from fedqueue_coordinator.service.replay_archive import REPLAY_FOLDER

LedgerRecord = Mapping[str, Any]
READ_ATTEMPTS = 100
"""Attempts to read a run in progress at one moment."""


@dataclass(frozen=True)
class AuditInput:
    """A snapshot of what a run recorded."""

    run: str
    ledger: Sequence[LedgerRecord]
    dispatched: int
    """The highest job number that was assigned, over all epochs."""
    unfinished: Mapping[str, str]
    """Job → state ("open" or "posted"), for each job that has no ending."""
    posted_entries: Sequence[str] | None
    """Jobs with an update or ending that is still in the streams; None if the streams were deleted."""
    head: int
    """The newest version."""
    replay: Replay | None
    """None if the run cannot be replayed: its payloads were not kept, or `own_code`."""
    own_code: bool = False
    """True if the configuration in Redis names an aggregation of the user's own, which is never imported from there."""
    signatures: Signatures | None = None
    """None for the results in a folder, where nothing is signed."""
    masked: MaskedVersions | None = None
    """None for a run without keepers, and for results in a folder without the configuration."""


def read_audit_input(run: str, url: str, keys: Path = Path("keys")) -> AuditInput:
    """Read the run named `run`, or the folder of results at the path `run`; raises RunNotFound.

    `url` is the Redis URL to look at (see `reachable_servers`). `keys` is the folder with the coordinator's public key;
    without that file, signatures are not verified.
    """
    if (Path(run) / "ledger.jsonl").exists():
        return read_result_folder(Path(run))
    for client in reachable_servers(url):
        if run in list_runs(client):
            return read_run_in_redis(CoordinatorStore(client, run, owner="audit"), keys)
    if run in finished_runs():
        return read_result_folder(finished_runs()[run])
    raise RunNotFound(run)


def read_run_in_redis(store: CoordinatorStore, keys: Path) -> AuditInput:
    """Read a consistent snapshot of a run; raises StoreError if the run changes faster than it can be read."""
    for _ in range(READ_ATTEMPTS):
        with contextlib.suppress(BlobMissing):  # the newest version was replaced before it was read
            if complete := _read_snapshot(store, keys):
                return complete()
    raise StoreError(f"run {store.run!r} is changing too fast to audit; retry, or audit it after it has ended")


def _read_snapshot(store: CoordinatorStore, keys: Path) -> Callable[[], AuditInput] | None:
    """Read everything that changes during a run in one transaction; None if the run changed before that transaction.

    The returned function adds the replay and the signatures, whose inputs do not change. It raises BlobMissing if the
    newest version was replaced in the meantime.
    """
    info = store.info()
    config = parse_config(info.config)
    own_code = config.ledger.keep_payloads and config.aggregation.own
    # A new epoch starts without the payloads of the epoch before it.
    replayable = config.ledger.keep_payloads and not own_code and not info.epoch
    manifest = Manifest.unpack(info.manifest)
    frame = store.read_model(info.version, downlink_codec(config.compression, manifest)) if replayable else None
    of_run = store.keys
    names = [name.decode() for name in cast(set[bytes], store.redis.smembers(of_run.jobs))]
    streams = ["", *store.clients()]
    pipe = store.redis.pipeline(transaction=True)
    pipe.hmget(of_run.head, "version", "job_number")
    pipe.smembers(of_run.jobs)
    pipe.scard(of_run.clients)
    pipe.xrange(of_run.ledger)
    for job in names:
        pipe.hget(of_run.attempt(job), "posted")
    for client in streams:
        pipe.xrange(of_run.updates(client))
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
        verify_signatures(store, info, records, keys),
        _masked_versions(config, info, records, keys),
    )


def _masked_versions(
    config: Config, info: RunInfo, records: Sequence[LedgerRecord], keys: Path
) -> MaskedVersions | None:
    if not config.secure.on:
        return None
    body = unverified_body(info.descriptor)  # it is verified by `verify_signatures`
    try:
        instance = read(RunDescriptor, body).instance
    except WireError:
        return check_masked_versions(config, records)
    return check_masked_versions(config, records, Scope(info.run, instance, info.epoch), keys)


def read_result_folder(folder: Path) -> AuditInput:
    """Read the results that `write_results` left in `folder`, and the payloads that the run kept; raises StoreError."""
    summary, ledger = read_summary(folder, "run", "jobs_dispatched", "versions"), read_ledger(folder)
    replay = replay_folder(folder / REPLAY_FOLDER, ledger) if (folder / REPLAY_FOLDER).exists() else None
    masked = None
    if replay and (config := read_archive(folder / REPLAY_FOLDER).config).secure.on:
        masked = check_masked_versions(config, ledger)
    return AuditInput(
        summary["run"], ledger, summary["jobs_dispatched"], {}, None, summary["versions"], replay, masked=masked
    )
