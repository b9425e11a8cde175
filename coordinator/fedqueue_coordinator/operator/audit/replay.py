"""Replays a run from version 0 out of its ledger and the payloads that were kept, and compares the bits (I3)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedqueue.config.loading import Config, parse_config
from fedqueue.errors import BlobMissing, WireError
from fedqueue.tensors.codec import downward, upward
from fedqueue.tensors.frame import Frame, Manifest
from fedqueue.transport.store import BlobBuffer
from fedqueue_coordinator.algorithms.aggregator import Contribution
from fedqueue_coordinator.algorithms.registry import make_aggregator
from fedqueue_coordinator.algorithms.server_optimizer import ServerOptimizer
from fedqueue_coordinator.service.coordinator_store import CoordinatorStore

REPLAY_FOLDER = "replay"
OWN_CODE = "folder.txt"  # where the configuration was read from, if it names code of the user's own


@dataclass(frozen=True)
class Replay:
    updates: int
    problems: Sequence[str]


def replay(
    config: Config,
    ledger: Sequence[Mapping[str, Any]],
    model: Frame,
    read_payload: Callable[[str, int], BlobBuffer],
    expected: Frame,
    rounded: bool = False,
) -> Replay:
    """Run every merge of the ledger again on `model`, version 0, and compare the end with `expected`.

    `read_payload(job, attempt)` gives a payload as it was posted, or raises BlobMissing. `rounded`: what is expected
    is the last version as workers get it.
    """
    up, down = upward(config.compression, model.manifest), downward(config.compression, model.manifest)

    def published(version: int) -> Frame:
        return down.received(down.encode(model, version))

    aggregator = make_aggregator(config)
    optimizer = ServerOptimizer(config.server_optimizer, model)
    accumulator = aggregator.init(model.manifest)
    versions = [record for record in ledger if record["kind"] == "version"]
    last_use = {line["base"]: record["version"] for record in versions for line in record["merged"]}
    bases = {0: published(0)} if aggregator.needs_base else {}
    updates, problems = 0, []
    for record in versions:
        for line in record["merged"]:
            try:
                delta = up.decode(read_payload(line["job"], line["attempt"]))
            except (BlobMissing, WireError) as error:
                return Replay(updates, [f"the payload of job {line['job']} cannot be read: {error}"])
            base = bases.get(line["base"])
            if aggregator.needs_base and line["staleness"] and base is None:
                return Replay(updates, [f"job {line['job']}: version {line['base']} is not its base in this ledger"])
            if not aggregator.takes_pieces:
                delta = delta.whole()
            contribution = Contribution(delta, line["examples"], line["staleness"], base, line["client"])
            weight = aggregator.add(accumulator, contribution, model)
            if weight != line["weight"]:
                problems.append(f"job {line['job']}: weight {weight}, the ledger says {line['weight']}")
            updates += 1
        optimizer.step(aggregator.finish(accumulator, model))
        accumulator.clear()
        if aggregator.needs_base:
            bases[record["version"]] = published(record["version"])
            bases = {v: frame for v, frame in bases.items() if last_use.get(v, -1) > record["version"]}
    end = published(versions[-1]["version"] if versions else 0) if rounded else model
    if not np.array_equal(end.buffer, expected.buffer):
        differing = int(np.count_nonzero(end.buffer != expected.buffer))
        problems.append(f"the model differs from the replay in {differing} of {model.buffer.nbytes} bytes")
    return Replay(updates, problems)


def replay_store(
    config: Config, store: CoordinatorStore, manifest: Manifest, ledger: Sequence[Mapping[str, Any]], head: Frame
) -> Replay:
    """Replay from what Redis keeps, up to `head` as it lies there."""
    first = store.read_model(0, downward(config.compression, manifest))
    return replay(config, ledger, first, _payloads(config, store, manifest), head, rounded=True)


def _payloads(config: Config, store: CoordinatorStore, manifest: Manifest) -> Callable[[str, int], BlobBuffer]:
    codec = upward(config.compression, manifest)

    def read(job: str, attempt: int) -> BlobBuffer:
        prefix = store.keys.kept_payload(job, attempt)
        wire = np.empty(store.blob_size(prefix, codec), np.uint8)
        store.read_blob(prefix, wire)
        return wire

    return read


def keep_replay(
    folder: Path, config: Config, store: CoordinatorStore, ledger: Sequence[Mapping[str, Any]], head: Frame
) -> None:
    """Copy the first version, the last one (exact) and every merged payload out of Redis into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(config.model_dump_json(), encoding="utf-8")
    if config.aggregation.own:
        (folder / OWN_CODE).write_text(str(config.folder.resolve()), encoding="utf-8")
    (folder / "manifest.msgpack").write_bytes(head.manifest.pack())
    head.buffer.tofile(folder / "head.bin")
    first = store.read_model(0, downward(config.compression, head.manifest))
    first.buffer.tofile(folder / "version-0.bin")
    read_payload = _payloads(config, store, head.manifest)
    for record in ledger:
        for line in record["merged"] if record["kind"] == "version" else ():
            read_payload(line["job"], line["attempt"]).tofile(folder / f"{line['job']}.{line['attempt']}.bin")


def replay_folder(folder: Path, ledger: Sequence[Mapping[str, Any]]) -> Replay:
    """Replay from what `keep_replay` left."""
    config = parse_config(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    if (folder / OWN_CODE).exists():
        config = config.located(Path((folder / OWN_CODE).read_text(encoding="utf-8")))
    manifest = Manifest.unpack((folder / "manifest.msgpack").read_bytes())

    def read(name: str) -> BlobBuffer:
        path = folder / name
        if not path.exists():
            raise BlobMissing(str(path))
        return np.fromfile(path, np.uint8)

    first, head = Frame(manifest, read("version-0.bin")), Frame(manifest, read("head.bin"))
    return replay(config, ledger, first, lambda job, attempt: read(f"{job}.{attempt}.bin"), head)
