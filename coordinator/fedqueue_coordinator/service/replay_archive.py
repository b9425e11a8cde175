"""Keeps what a replay of a finished run needs, as files: version 0, the last one, each merged payload, and masks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedqueue.config.schema import Config
from fedqueue.tensors.blobs import BlobBuffer
from fedqueue.tensors.codec import downlink_codec, update_codec
from fedqueue.tensors.frame import Frame
from fedqueue.tensors.manifest import Manifest
from fedqueue_coordinator.service.coordinator_store import CoordinatorStore

REPLAY_FOLDER = "replay"
OWN_CODE = "folder.txt"  # the folder of the configuration, if that names the user's own code


def kept_payloads(config: Config, store: CoordinatorStore, manifest: Manifest) -> Callable[[str, int], BlobBuffer]:
    """Return a function (job, attempt) → payload as posted; it raises BlobMissing for one that Redis has not kept."""
    codec = update_codec(config, manifest)

    def read(job: str, attempt: int) -> BlobBuffer:
        prefix = store.keys.kept_payload(job, attempt)
        wire = np.empty(store.blob_size(prefix, codec), np.uint8)
        store.read_blob(prefix, wire)
        return wire

    return read


def kept_masks(config: Config, store: CoordinatorStore, manifest: Manifest) -> Callable[[str, str], BlobBuffer]:
    """Return a function (cohort, keeper) → its masks; it raises BlobMissing for those that Redis has not kept."""
    nbytes = update_codec(config, manifest).nbytes

    def read(cohort: str, keeper: str) -> BlobBuffer:
        masks = np.empty(nbytes, np.uint8)
        store.read_blob(store.keys.kept_mask(cohort, keeper), masks)
        return masks

    return read


def masks_file(cohort: str, keeper: str) -> str:
    """The name of the file with a keeper's masks of a cohort."""
    return f"masks.{cohort}.{keeper}.bin"


def keep_replay(
    folder: Path, config: Config, store: CoordinatorStore, ledger: Sequence[Mapping[str, Any]], head: Frame
) -> None:
    """Copy the first version, the last one (exact), every merged payload and all masks out of Redis into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(config.model_dump_json(), encoding="utf-8")
    if config.aggregation.own:
        (folder / OWN_CODE).write_text(str(config.folder.resolve()), encoding="utf-8")
    (folder / "manifest.msgpack").write_bytes(head.manifest.pack())
    head.buffer.tofile(folder / "head.bin")
    first = store.read_model(0, downlink_codec(config.compression, head.manifest))
    first.buffer.tofile(folder / "version-0.bin")
    read_payload = kept_payloads(config, store, head.manifest)
    read_masks = kept_masks(config, store, head.manifest)
    for record in ledger:
        for line in record["merged"] if record["kind"] == "version" else ():
            read_payload(line["job"], line["attempt"]).tofile(folder / f"{line['job']}.{line['attempt']}.bin")
        for keeper in record.get("masks", ()):
            read_masks(record["cohort"], keeper).tofile(folder / masks_file(record["cohort"], keeper))
