"""The coordinator's own copy of a run on disk, from which a run continues after Redis lost its data.

A checkpoint is one safetensors file, written by a background thread and renamed into place: `model`, `frozen` and
`optimizer_state` (uint8), `ledger` (msgpack, uint8), and the rest as JSON in its metadata.
"""

from __future__ import annotations

import json
import math
import os
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import safetensors
import safetensors.numpy
import structlog
from pydantic import BaseModel, ConfigDict

from fedqueue.config.names import ClientId, RunName
from fedqueue.errors import StoreError, WireError
from fedqueue.protocol.messages import Natural
from fedqueue.protocol.msgpack import unpack
from fedqueue.tensors.blobs import BlobBuffer
from fedqueue_coordinator.core.federation import Federation

log = structlog.get_logger("fedqueue.coordinator")

CHECKPOINT_FILENAME = "checkpoint.safetensors"
ARRAYS = ("model", "frozen", "optimizer_state", "ledger")
FORMAT = "3"


@dataclass(frozen=True)
class Checkpoint:
    """A version, and everything else that a new epoch needs to continue from it."""

    run: str
    manifest_digest: str
    epoch: int
    version: int
    job_number: int
    totals: dict[str, Any]
    unfinished: dict[str, str]
    """Job → client for the jobs that were open or buffered; they end with the epoch."""
    model: BlobBuffer
    frozen: BlobBuffer
    """The model's frozen tensors; of no bytes if it has none."""
    optimizer_state: bytes
    ledger: list[dict[str, Any]]

    @classmethod
    def from_federation(cls, federation: Federation, ledger: list[dict[str, Any]]) -> Checkpoint:
        """Copy the federation's state after its last commit; `ledger` is the whole ledger up to now."""
        return cls(
            run=federation.config.name,
            manifest_digest=federation.model.manifest.digest,
            epoch=federation.epoch,
            version=federation.version,
            job_number=federation.job_number,
            totals=federation.run_counters.committed(),
            unfinished=federation.unfinished,
            model=federation.model.buffer.copy(),
            frozen=np.empty(0, np.uint8) if federation.model.frozen is None else federation.model.frozen,
            optimizer_state=federation.optimizer_state,
            ledger=ledger,
        )


class _Plain(BaseModel):
    """The metadata of a checkpoint, validated, since the file may be any file."""

    model_config = ConfigDict(extra="forbid", strict=True)

    run: RunName
    manifest_digest: str
    epoch: Natural
    version: Natural
    job_number: Natural
    totals: dict[str, Any]
    unfinished: dict[str, ClientId]


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write a new file and rename it to `path`, so that `path` is always a complete checkpoint; raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    plain = {k: v for k, v in vars(checkpoint).items() if k not in ARRAYS}
    arrays = {
        "model": checkpoint.model,
        "frozen": checkpoint.frozen,
        "optimizer_state": np.frombuffer(checkpoint.optimizer_state, np.uint8),
        "ledger": np.frombuffer(msgpack.packb(checkpoint.ledger), np.uint8),
    }
    new = path.with_suffix(".new")
    try:
        safetensors.numpy.save_file(arrays, new, {"format": FORMAT, "checkpoint": json.dumps(plain)})
        with new.open("rb") as file:
            os.fsync(file.fileno())
        new.replace(path)
    except BaseException:
        new.unlink(missing_ok=True)  # a part of it would keep a full disk full
        raise


def load_checkpoint(path: Path) -> Checkpoint | None:
    """Read the checkpoint at `path`; None if no file exists. Raises StoreError for a file that is no checkpoint."""
    if not path.exists():
        return None
    try:
        with safetensors.safe_open(path, "np") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise StoreError(f"{path} is no checkpoint of this version of fedqueue")
            plain = _Plain.model_validate_json(metadata["checkpoint"])
            model, frozen, state, ledger = arrays = [file.get_tensor(name) for name in ARRAYS]
            if any(array.dtype != np.uint8 or array.ndim != 1 for array in arrays):
                raise ValueError("its tensors are not uint8")
            records = unpack(ledger.tobytes(), sys.maxsize)  # the file is local and already in memory
            if not (isinstance(records, list) and all(isinstance(record, dict) for record in records)):
                raise ValueError("its ledger is not a list of records")
            return Checkpoint(
                **dict(plain), model=model, frozen=frozen, optimizer_state=state.tobytes(), ledger=records
            )
    except (safetensors.SafetensorError, OSError, KeyError, ValueError, WireError) as error:
        raise StoreError(f"{path} cannot be read as a checkpoint: {error}") from error


class Checkpointer:
    """Saves one checkpoint at a time in a background thread; a slow disk does not delay merging."""

    def __init__(self, path: Path, seconds: float | None) -> None:
        self.path = path
        self._seconds = math.inf if seconds is None else seconds
        self._next = self._seconds
        self.saved: int | None = None
        """The version in the newest checkpoint that this process has saved."""
        self._thread: threading.Thread | None = None

    def due(self, now: float) -> bool:
        """Whether the next checkpoint is due at `now`, in seconds of the run's clock, and no save is in progress."""
        return now >= self._next and not (self._thread and self._thread.is_alive())

    def start(self, checkpoint: Checkpoint, now: float) -> None:
        """Begin to save `checkpoint`; its arrays must not change afterwards."""
        self.join()
        self._next = now + self._seconds
        self._thread = threading.Thread(target=self._save, args=(checkpoint,), name="checkpoint")
        self._thread.start()

    def join(self) -> None:
        """Wait until the save in progress has ended."""
        if self._thread:
            self._thread.join()
            self._thread = None

    def delete(self) -> None:
        """Delete the checkpoint of a finished run, so that a later run of the same name starts from version 0."""
        self.join()
        try:
            self.path.unlink(missing_ok=True)
        except OSError as error:
            log.warning("checkpoint of the finished run not deleted", path=str(self.path), error=str(error))

    def _save(self, checkpoint: Checkpoint) -> None:
        try:
            save_checkpoint(self.path, checkpoint)
            self.saved = checkpoint.version
        except (OSError, safetensors.SafetensorError) as error:
            log.warning("checkpoint not saved; check the disk", path=str(self.path), error=str(error))
