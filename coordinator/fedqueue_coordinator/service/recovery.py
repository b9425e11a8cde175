"""How a coordinator comes to lead a run: it starts it, goes on from the last commit, or begins a new epoch.

A crash, a restart, a standby and an outage of Redis all end here: whoever gets the lead reads what the last commit left
and every entry that it did not acknowledge, and so reaches the state that its predecessor had.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import structlog
import torch

from fedqueue.config.loading import Config
from fedqueue.errors import ConfigurationError, RunExists, StoreError, WireError
from fedqueue.protocol.coordinator_identity import require_signed
from fedqueue.protocol.messages import Order
from fedqueue.task import Task
from fedqueue.tensors.codec import downward
from fedqueue.tensors.frame import Frame, Manifest
from fedqueue.training import set_seed
from fedqueue_coordinator.core.federation import Federation
from fedqueue_coordinator.core.ledger_records import abandoned_record, epoch_record
from fedqueue_coordinator.core.run_counters import RunCounters
from fedqueue_coordinator.service.checkpoint import Checkpoint
from fedqueue_coordinator.service.coordinator_store import CoordinatorStore
from fedqueue_coordinator.service.entry_verifier import EntryVerifier

log = structlog.get_logger("fedqueue.coordinator")

MAY_CHANGE = {"redis", "security", "stop", "evaluation", "checkpoint", "dispatch"}
"""Sections that another coordinator of the same run may set differently."""


def restore_federation(
    config: Config,
    store: CoordinatorStore,
    task: Task,
    checkpoint: Checkpoint | None,
    evaluates: bool,
    verifier: EntryVerifier,
) -> Federation:
    """The federation as it stands in Redis; the caller leads the run.

    Raises RunExists for a run that has ended, ManifestMismatch for another model, ConfigurationError for settings that
    cannot change while a run goes on.
    """
    set_seed(config.seed)
    module = task.model()  # kept by nobody: it is as large as a version
    manifest = Manifest.from_module(module)
    if store.exists():
        return _resume(config, store, manifest, evaluates, verifier)
    if checkpoint:
        return _new_epoch(config, store, manifest, checkpoint, evaluates)
    federation = Federation(config, initial_model(config, module), evaluates=evaluates)
    store.create(config.model_dump_json(), manifest, epoch=0, clients=config.clients.ids)
    if config.ledger.keep_payloads:
        store.pin_version(0)
    wire = federation.down.encode(federation.model, 0)
    state = as_buffer(federation.optimizer_state)
    store.publish(0, wire, state, [], RunCounters().committed(), [], most_bytes=most_bytes(federation))
    return federation


def most_bytes(federation: Federation) -> tuple[int, int]:
    """Of a stored version, and of a posted update."""
    return federation.down.largest, federation.up.largest


def initial_model(config: Config, module: torch.nn.Module) -> Frame:
    """The module's values, rounded as they are published: a replay begins from what is stored of version 0."""
    model = Frame(Manifest.from_module(module))
    model.read(module)
    codec = downward(config.compression, model.manifest)
    return codec.decode(codec.encode(model, 0)).whole() if codec.encoding else model


def _resume(
    config: Config, store: CoordinatorStore, manifest: Manifest, evaluates: bool, verifier: EntryVerifier
) -> Federation:
    """Goes on from the head. Where the run is signed, it is verified anew, and so are the registrations."""
    info = store.info()
    if info.state != "running":
        raise RunExists(config.name, f"has ended ({info.stopped_because})")
    Manifest.unpack(info.manifest).require(manifest)
    _require_same(config, info.config)
    require_signed(store.identity, info)
    codec = downward(config.compression, manifest)
    wire = store.read_wire(info.version, codec)
    state, job_number, ledger = store.read_optimizer_state(info.version), store.job_number(), store.ledger()
    if store.identity:
        store.set_descriptor(store.identity.resume(info))
        envelope = store.read_version_signature(info.version, wire.nbytes)
        signed = store.identity.check_version(info.version, envelope, wire, state)
        store.identity.check_history(info.version, signed, ledger, info.totals)
        job_number = max(job_number, signed.job_number)  # a name that was given out is not given out again
    federation = Federation(
        config,
        codec.decode(wire).whole(),
        info.version,
        job_number,
        state,
        RunCounters.from_ledger(info.totals, ledger, config.dispatch.share_window),
        evaluates,
        info.epoch,
        _norms(config, ledger),
    )
    jobs = {job.job: job.client for job in store.jobs()}
    federation.restore_jobs(jobs, verified_registrations(store, verifier), store.last_jobs())
    if config.aggregation.filter.on:
        federation.restore_quarantines(ledger, federation.totals.seconds)
    log.info("resumed", run=config.name, version=info.version, jobs=len(jobs))
    return federation


def _new_epoch(
    config: Config, store: CoordinatorStore, manifest: Manifest, checkpoint: Checkpoint, evaluates: bool
) -> Federation:
    """Redis holds nothing of the run, the disk does: go on from there, under a number that stragglers do not know."""
    if checkpoint.run != config.name or checkpoint.manifest_digest != manifest.digest:
        raise StoreError(
            f"the checkpoint is of run {checkpoint.run!r} or of another model; delete it to start {config.name!r} anew"
        )
    totals = RunCounters.from_ledger(checkpoint.totals, checkpoint.ledger, config.dispatch.share_window)
    epoch = checkpoint.epoch + 1
    federation = Federation(
        config,
        Frame(manifest, checkpoint.model.copy()),
        checkpoint.version,
        checkpoint.job_number,
        checkpoint.optimizer_state,
        totals,
        evaluates,
        epoch,
        _norms(config, checkpoint.ledger),
    )
    lost = [
        abandoned_record(job, client, "epoch_lost", "", checkpoint.version, totals.seconds)
        for job, client in sorted(checkpoint.unfinished.items())
    ]
    record = epoch_record(epoch, checkpoint.version, checkpoint.job_number, totals.seconds)
    federation.restore_quarantines(checkpoint.ledger, totals.seconds)
    store.create(config.model_dump_json(), manifest, epoch, config.clients.ids, floor=checkpoint.version)
    store.restore(checkpoint.version, checkpoint.job_number, [*checkpoint.ledger, *lost, record])
    store.publish(
        checkpoint.version,
        federation.down.encode(federation.model, checkpoint.version),
        as_buffer(federation.optimizer_state),
        [],
        checkpoint.totals,
        [],
        job_number=checkpoint.job_number,
        most_bytes=most_bytes(federation),
    )
    log.warning("Redis had lost the run: a new epoch starts", epoch=epoch, version=checkpoint.version)
    return federation


def verified_registrations(store: CoordinatorStore, verifier: EntryVerifier) -> dict[str, int]:
    """Client → examples, for every client whose registration holds."""
    examples: dict[str, int] = {}
    for client, data in store.signed_registrations().items():
        try:
            examples[client] = verifier.registration(client, data).examples
        except WireError as error:
            log.warning("a registration does not count", client=client, error=str(error))
    return examples


def unstarted_orders(store: CoordinatorStore) -> list[Order]:
    """The orders of the jobs that nobody has begun; one that is not this coordinator's is left to its lease."""
    orders = []
    for job in store.jobs():
        if job.state == "open" and job.attempt == 0:
            try:
                orders.append(store.unpack_order(job.order))
            except WireError as error:
                log.warning("a job's order does not count", job=job.job, error=str(error))
    return orders


def _norms(config: Config, ledger: list[dict[str, Any]]) -> list[float]:
    """Of the updates merged so far, the newest that the norm limit looks at; none where it looks at none."""
    if not config.admission.norm_quantile:
        return []
    norms = [line["norm"] for record in ledger if record["kind"] == "version" for line in record["merged"]]
    return norms[-config.admission.norm_window :]


def _require_same(config: Config, stored: dict[str, Any]) -> None:
    mine = config.model_dump(mode="json")
    for section in mine.keys() - MAY_CHANGE:
        if mine[section] != stored.get(section):
            raise ConfigurationError(
                section,
                mine[section],
                f"cannot change while the run goes on; it was started with {stored.get(section)!r}",
            )


def as_buffer(data: bytes) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.frombuffer(data, np.uint8)
