"""Recovery: makes the federation of a new leader, which starts a run, resumes it, or begins a new epoch.

After a crash, a restart, a takeover by a standby or an outage of Redis, the leader restores what the last commit
stored, and then reads every entry that no commit has acknowledged. So it reaches the state of the coordinator before
it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import structlog
import torch

from fedqueue.config.schema import Config
from fedqueue.errors import ConfigurationError, RunExists, StoreError, WireError
from fedqueue.private_training import check_example_privacy
from fedqueue.protocol.coordinator_identity import require_signed
from fedqueue.protocol.messages import Cohort
from fedqueue.task import Task, make_model
from fedqueue.tensors.codec import downlink_codec
from fedqueue.tensors.frame import Frame
from fedqueue.tensors.manifest import Manifest
from fedqueue.training import check_training, set_seed
from fedqueue_coordinator.core.events import Stop
from fedqueue_coordinator.core.federation import Federation, initial_model
from fedqueue_coordinator.core.ledger_records import abandoned_record, epoch_record
from fedqueue_coordinator.core.reasons import AbandonReason
from fedqueue_coordinator.core.run_counters import RunCounters
from fedqueue_coordinator.service.checkpoint import Checkpoint
from fedqueue_coordinator.service.coordinator_store import CoordinatorStore
from fedqueue_coordinator.service.entry_verifier import EntryVerifier
from fedqueue_coordinator.service.memory_watch import MemoryWatch
from fedqueue_coordinator.service.publication import publish_newest

log = structlog.get_logger("fedqueue.coordinator")

MAY_CHANGE = {"redis", "security", "stop", "evaluation", "checkpoint", "dispatch"}
"""Sections of the configuration that may change when a run is resumed."""


def restore_federation(
    config: Config,
    store: CoordinatorStore,
    task: Task,
    checkpoint: Checkpoint | None,
    evaluates: bool,
    verifier: EntryVerifier,
    memory: MemoryWatch,
    ended_too: bool = False,
) -> Federation:
    """Make the federation of the run in Redis, or of `checkpoint`, or of a new run; the caller leads the run.

    With `ended_too`, a run in Redis may have ended; the federation has stopped then.

    Raises RunExists for a run that has ended, ManifestMismatch for another model, ConfigurationError for settings that
    cannot change during a run, StoreError for a checkpoint of another run, and SignatureError for forged contents.
    """
    set_seed(config.seed)
    module = make_model(task)  # not stored: it takes as much memory as a version
    manifest = Manifest.from_module(module, config.aggregation)
    check_training(config.training, torch.device("cpu"), module)
    check_example_privacy(config.privacy.examples, task, module)
    memory.check_policy(config, manifest)
    if store.exists():
        return _resume(config, store, manifest, evaluates, verifier, ended_too)
    if checkpoint:
        return _new_epoch(config, store, manifest, checkpoint, evaluates)
    federation = Federation(config, initial_model(config, module), evaluates=evaluates)
    frozen = federation.model.frozen
    store.create(config.model_dump_json(), manifest, epoch=0, clients=config.clients.ids, frozen=frozen)
    if config.ledger.keep_payloads:
        store.pin_version(0)
    publish_newest(store, federation)
    return federation


def _resume(
    config: Config,
    store: CoordinatorStore,
    manifest: Manifest,
    evaluates: bool,
    verifier: EntryVerifier,
    ended_too: bool,
) -> Federation:
    """Resume from the head. The contents of a signed run, and all registrations, are verified again."""
    info = store.info()
    ended = info.state != "running"
    if ended and not ended_too:
        hint = (
            f"`fedqueue remove {config.name}` deletes it, another name (the key `name`) starts another run, and the "
            "option --resume of `fedqueue run` and `fedqueue coordinator` continues one that failed or was interrupted "
            "from its checkpoint"
        )
        raise RunExists(config.name, f"has ended ({info.stopped_because})", hint)
    Manifest.unpack(info.manifest).require(manifest)
    _require_same(config, info.config)
    require_signed(store.identity, info)
    codec = downlink_codec(config.compression, manifest)
    wire, frozen = store.read_wire(info.version, codec), store.read_frozen(manifest.frozen_nbytes)
    state, job_number, ledger = store.read_optimizer_state(info.version), store.job_number(), store.ledger()
    if store.identity:
        store.set_descriptor(store.identity.resume(info, frozen))
        envelope = store.read_version_signature(info.version, wire.nbytes)
        signed = store.identity.check_version(info.version, envelope, wire, state)
        store.identity.check_history(info.version, signed, ledger, info.totals)
        job_number = max(job_number, signed.job_number)  # a job's name must not be used twice
    model = codec.decode(wire).whole()
    model.frozen = frozen
    federation = Federation(
        config,
        model,
        info.version,
        job_number,
        state,
        RunCounters.from_ledger(info.totals, ledger, config.dispatch.share_window),
        evaluates,
        info.epoch,
        _norms(config, ledger),
        _proposed(store) if config.secure.on else None,
    )
    if config.secure.on:
        _restore_digests(federation, ledger, signed.model)
    jobs = {job.job: job.client for job in store.jobs()}
    registered = verifier.valid_registrations(store.registrations_of(sorted({*jobs.values()})))
    federation.restore_jobs(jobs, registered, store.last_jobs())  # the other clients return later
    if config.aggregation.filter.on:
        federation.restore_quarantines(ledger, federation.run_counters.seconds)
    if ended:
        federation.stopped = Stop(info.stopped_because, info.failed)
    log.info("resumed", run=config.name, version=info.version, jobs=len(jobs))
    return federation


def _new_epoch(
    config: Config, store: CoordinatorStore, manifest: Manifest, checkpoint: Checkpoint, evaluates: bool
) -> Federation:
    """Resume a lost run from its checkpoint, under a new epoch number, so that late workers are refused."""
    if checkpoint.run != config.name or checkpoint.manifest_digest != manifest.digest:
        raise StoreError(
            f"the checkpoint is of run {checkpoint.run!r} or of another model; "
            f"delete it to start {config.name!r} from version 0"
        )
    run_counters = RunCounters.from_ledger(checkpoint.totals, checkpoint.ledger, config.dispatch.share_window)
    epoch = checkpoint.epoch + 1
    federation = Federation(
        config,
        Frame(manifest, checkpoint.model.copy(), checkpoint.frozen if manifest.frozen_nbytes else None),
        checkpoint.version,
        checkpoint.job_number,
        checkpoint.optimizer_state,
        run_counters,
        evaluates,
        epoch,
        _norms(config, checkpoint.ledger),
    )
    lost = [
        abandoned_record(job, client, AbandonReason.EPOCH_LOST, "", checkpoint.version, run_counters.seconds)
        for job, client in sorted(checkpoint.unfinished.items())
    ]
    record = epoch_record(epoch, checkpoint.version, checkpoint.job_number, run_counters.seconds)
    federation.restore_quarantines(checkpoint.ledger, run_counters.seconds)
    store.create(
        config.model_dump_json(), manifest, epoch, config.clients.ids, checkpoint.version, federation.model.frozen
    )
    store.restore(checkpoint.version, checkpoint.job_number, [*checkpoint.ledger, *lost, record])
    publish_newest(store, federation)
    log.warning(
        "run missing from Redis: a new epoch begins from the checkpoint", epoch=epoch, version=checkpoint.version
    )
    return federation


def _proposed(store: CoordinatorStore) -> Cohort | None:
    """The cohort that a former coordinator has shown to the keepers and that no commit has; None without any."""
    data = store.proposed()
    if not data or store.identity is None:
        return None
    try:
        return store.identity.open_cohort(data)
    except WireError as error:
        log.warning("ignoring the cohort in Redis, which this coordinator has not signed", error=str(error))
        return None


def _restore_digests(federation: Federation, ledger: Iterable[Mapping[str, Any]], newest: str) -> None:
    """Remember the digests of versions: the record of the next one has each, and `newest` is that of the head."""
    for record in ledger:
        if digest := record.get("trained_from"):
            federation.published(record["version"] - 1, digest)
    federation.published(federation.version, newest)


def _norms(config: Config, ledger: list[dict[str, Any]]) -> list[float]:
    """Norms of the merged updates in the window of the norm limit; empty if the limit does not depend on them."""
    if not config.admission.norm_quantile:
        return []
    norms = [line["norm"] for record in ledger if record["kind"] == "version" for line in record["merged"]]
    return norms[-config.admission.norm_window :]


def _require_same(config: Config, stored: dict[str, Any]) -> None:
    """Raise ConfigurationError for keys that must not change and differ from the `stored` ones."""
    mine = config.model_dump(mode="json")
    changed = [
        difference
        for section in mine
        if section not in MAY_CHANGE
        for difference in _differences(section, stored.get(section), mine[section])
    ]
    if changed:
        keys = ", ".join(key for key, _, _ in changed)
        was = "; ".join(f"{key} is {old!r} in the run, {new!r} here" for key, old, new in changed)
        raise ConfigurationError(
            keys, None, f"cannot change during a run ({was})", "restore the run's value, or start another run"
        )


def _differences(key: str, old: Any, new: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield (key, old value, new value) for each value below `key` that differs."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted({*old, *new}):
            yield from _differences(f"{key}.{name}", old.get(name), new.get(name))
    elif old != new:
        yield key, old, new
