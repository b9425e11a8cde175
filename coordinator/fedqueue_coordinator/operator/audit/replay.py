"""Replays a run from version 0 with its ledger and its kept payloads, and compares the bits (invariant I3)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedqueue.config.loading import parse_config
from fedqueue.config.schema import Config
from fedqueue.errors import BlobMissing, StoreError, WireError
from fedqueue.protocol.signed_envelope import digest_of
from fedqueue.secure.ring import ring_of
from fedqueue.tensors.blobs import BlobBuffer
from fedqueue.tensors.codec import downlink_codec, update_codec
from fedqueue.tensors.frame import Frame
from fedqueue.tensors.manifest import Manifest
from fedqueue_coordinator.algorithms.aggregator import Contribution
from fedqueue_coordinator.algorithms.masked_sum import MaskedSum
from fedqueue_coordinator.algorithms.registry import make_aggregator
from fedqueue_coordinator.algorithms.server_optimizer import ServerOptimizer
from fedqueue_coordinator.service.coordinator_store import CoordinatorStore
from fedqueue_coordinator.service.replay_archive import OWN_CODE, kept_masks, kept_payloads, masks_file


@dataclass(frozen=True)
class Replay:
    """The result of a replay."""

    updates: int
    """Updates that were merged again."""
    problems: Sequence[str]
    """Differences from the ledger or the expected model; empty if the replay gives the same bits."""


def no_follower(version: int, model: Frame) -> None:
    """No-op, where no caller follows the versions of a replay."""


def no_observer(version: int, masked_sum: MaskedSum) -> None:
    """No-op, where no caller looks at the unmasked sums of a replay."""


def no_masks(cohort: str, keeper: str) -> BlobBuffer:
    """Raise BlobMissing, where a run has no keepers."""
    raise BlobMissing(f"masks of keeper {keeper} for cohort {cohort}")


def replay(
    config: Config,
    ledger: Sequence[Mapping[str, Any]],
    model: Frame,
    read_payload: Callable[[str, int], BlobBuffer],
    expected: Frame | None,
    rounded: bool = False,
    on_version: Callable[[int, Frame], None] = no_follower,
    read_masks: Callable[[str, str], BlobBuffer] = no_masks,
    on_sum: Callable[[int, MaskedSum], None] = no_observer,
) -> Replay:
    """Repeat every merge of the ledger on `model`, version 0, in place, and compare the result with `expected`.

    `read_payload(job, attempt)` returns a payload as it was posted, or raises BlobMissing. With `rounded`, `expected`
    is the last version as it was published to workers; otherwise it has the exact float32 parameters.
    `on_version(version, model)` is called with each version from 0 on; it may keep a copy of the model.
    `read_masks(cohort, keeper)` returns what a keeper released, in a run with keepers; there `on_sum(version, sum)` is
    called with the unmasked sum of each version.
    """
    uplink = update_codec(config, model.manifest)
    downlink = downlink_codec(config.compression, model.manifest)

    def published(version: int) -> Frame:
        return downlink.received(downlink.encode(model, version))

    aggregator = make_aggregator(config)
    optimizer = ServerOptimizer(config.server_optimizer, model)
    accumulator = aggregator.init(model.manifest)
    versions = [record for record in ledger if record["kind"] == "version"]
    last_use = {line["base"]: record["version"] for record in versions for line in record["merged"]}
    bases = {0: published(0)} if aggregator.needs_base else {}
    updates, problems = 0, []
    on_version(0, model)
    if config.secure.on:
        masked_sum = MaskedSum(accumulator, ring_of(config, model.manifest), config)
    for record in versions:
        if config.secure.on:
            try:
                problems += _unmask(masked_sum, record, read_payload, read_masks)
            except BlobMissing as error:
                return Replay(updates, [f"a payload of version {record['version']} cannot be read: {error}"])
            updates += len(record["merged"])
            on_sum(record["version"], masked_sum)
            optimizer.step(masked_sum.finish(aggregator, model))
            masked_sum.clear()
            on_version(record["version"], model)
            continue
        for line in record["merged"]:
            try:
                delta = uplink.decode(read_payload(line["job"], line["attempt"]))
            except (BlobMissing, WireError) as error:
                return Replay(updates, [f"the payload of job {line['job']} cannot be read: {error}"])
            base = bases.get(line["base"])
            if aggregator.needs_base and line["staleness"] and base is None:
                return Replay(updates, [f"job {line['job']}: version {line['base']} is not available as its base"])
            if not aggregator.takes_pieces:
                delta = delta.whole()
            contribution = Contribution(delta, line["examples"], line["staleness"], base, line["client"])
            weight = aggregator.add(accumulator, contribution, model)
            if weight != line["weight"]:
                problems.append(f"job {line['job']}: weight {weight}, the ledger says {line['weight']}")
            updates += 1
        optimizer.step(aggregator.finish(accumulator, model))
        accumulator.clear()
        on_version(record["version"], model)
        if aggregator.needs_base:
            bases[record["version"]] = published(record["version"])
            bases = {v: frame for v, frame in bases.items() if last_use.get(v, -1) > record["version"]}
    end = published(versions[-1]["version"] if versions else 0) if rounded else model
    if expected is not None and not np.array_equal(end.buffer, expected.buffer):
        differing = int(np.count_nonzero(end.buffer != expected.buffer))
        problems.append(f"the model differs from the replay in {differing} of {model.buffer.nbytes} bytes")
    return Replay(updates, problems)


def _unmask(
    masked_sum: MaskedSum,
    record: Mapping[str, Any],
    read_payload: Callable[[str, int], BlobBuffer],
    read_masks: Callable[[str, str], BlobBuffer],
) -> list[str]:
    """Add the masked updates of a version, and take the masks off; returns differences from the ledger.

    Raises BlobMissing for a payload or masks that were not kept.
    """
    problems = []
    for line in record["merged"]:
        words = read_payload(line["job"], line["attempt"]).view(np.uint32)
        masked_sum.add([words], line["level"], line["examples"], line["staleness"])
    for keeper, released in record.get("masks", {}).items():
        masks = read_masks(record["cohort"], keeper)
        if digest_of(masks) != released["digest"]:
            problems.append(f"the masks of keeper {keeper} for version {record['version']} are not those in the ledger")
        masked_sum.subtract([masks.view(np.uint32)])
    if problem := masked_sum.problem():
        problems.append(f"version {record['version']}: {problem}")
    return problems


def replay_store(
    config: Config, store: CoordinatorStore, manifest: Manifest, ledger: Sequence[Mapping[str, Any]], head: Frame
) -> Replay:
    """Replay from the payloads in Redis up to `head`, the newest version as stored."""
    first = store.read_model(0, downlink_codec(config.compression, manifest))
    return replay(
        config, ledger, first, kept_payloads(config, store, manifest), head, rounded=True,
        read_masks=kept_masks(config, store, manifest),
    )  # fmt: skip


@dataclass(frozen=True)
class Archive:
    """What `keep_replay` wrote to a folder."""

    config: Config
    first: Frame
    """Version 0 as workers got it."""
    head: Frame
    """The last version, with the exact float32 parameters."""
    read_payload: Callable[[str, int], BlobBuffer]
    """(job, attempt) → payload as posted; raises BlobMissing."""
    read_masks: Callable[[str, str], BlobBuffer]
    """(cohort, keeper) → masks as released, in a run with keepers; raises BlobMissing."""


def read_archive(folder: Path) -> Archive:
    """Read the files that `keep_replay` wrote to `folder`; raises StoreError if one is missing or damaged."""

    def read(name: str) -> BlobBuffer:
        path = folder / name
        if not path.exists():
            raise BlobMissing(str(path))
        return np.fromfile(path, np.uint8)

    try:
        config = parse_config(json.loads((folder / "config.json").read_text(encoding="utf-8")))
        if (folder / OWN_CODE).exists():
            config = config.located(Path((folder / OWN_CODE).read_text(encoding="utf-8")))
        manifest = Manifest.unpack((folder / "manifest.msgpack").read_bytes())
        first, head = Frame(manifest, read("version-0.bin")), Frame(manifest, read("head.bin"))
    except (OSError, ValueError, WireError) as error:
        raise StoreError(f"{folder} has a damaged file, so the run cannot be replayed: {error}") from None
    return Archive(
        config, first, head, lambda job, attempt: read(f"{job}.{attempt}.bin"),
        lambda cohort, keeper: read(masks_file(cohort, keeper)),
    )  # fmt: skip


def replay_folder(folder: Path, ledger: Sequence[Mapping[str, Any]]) -> Replay:
    """Replay from the files that `keep_replay` wrote to `folder`; raises StoreError if one is missing or damaged."""
    archive = read_archive(folder)
    return replay(
        archive.config, ledger, archive.first, archive.read_payload, archive.head, read_masks=archive.read_masks
    )
