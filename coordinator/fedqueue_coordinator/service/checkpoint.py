"""The coordinator's own copy of a run on disk, for the day on which Redis has lost everything.

One safetensors file, written beside the merging and moved into place whole: `model` and `optimizer_state` (uint8),
`ledger` (msgpack, uint8), and the rest as JSON in its metadata.
"""

from __future__ import annotations

import json
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

from fedqueue.config.sections import ClientId, RunName
from fedqueue.errors import StoreError, WireError
from fedqueue.protocol.messages import Natural, unpack
from fedqueue.transport.store import BlobBuffer
from fedqueue_coordinator.core.federation import Federation

log = structlog.get_logger("fedqueue.coordinator")

CHECKPOINT_FILENAME = "checkpoint.safetensors"
FORMAT = "2"


@dataclass(frozen=True)
class Checkpoint:
    """A version with all that a new epoch needs to go on from it."""

    run: str
    manifest_digest: str
    epoch: int
    version: int
    job_number: int
    totals: dict[str, Any]
    unfinished: dict[str, str]
    """Job → client, for the jobs that were open or buffered: they end with the epoch."""
    model: BlobBuffer
    optimizer_state: bytes
    ledger: list[dict[str, Any]]

    @classmethod
    def from_federation(cls, federation: Federation, ledger: list[dict[str, Any]]) -> Checkpoint:
        """A copy of the federation as its last commit left it; `ledger` is the whole ledger up to now."""
        return cls(
            run=federation.config.name,
            manifest_digest=federation.model.manifest.digest,
            epoch=federation.epoch,
            version=federation.version,
            job_number=federation.job_number,
            totals=federation.totals.committed(),
            unfinished=federation.unfinished,
            model=federation.model.buffer.copy(),
            optimizer_state=federation.optimizer_state,
            ledger=ledger,
        )


class _Plain(BaseModel):
    """What a checkpoint holds beside its arrays, as read from a file that may be any file."""

    model_config = ConfigDict(extra="forbid", strict=True)

    run: RunName
    manifest_digest: str
    epoch: Natural
    version: Natural
    job_number: Natural
    totals: dict[str, Any]
    unfinished: dict[str, ClientId]


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write it beside `path` and move it there, so that `path` is always a whole one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    plain = {k: v for k, v in vars(checkpoint).items() if k not in ("model", "optimizer_state", "ledger")}
    arrays = {
        "model": checkpoint.model,
        "optimizer_state": np.frombuffer(checkpoint.optimizer_state, np.uint8),
        "ledger": np.frombuffer(msgpack.packb(checkpoint.ledger), np.uint8),
    }
    new = path.with_suffix(".new")
    safetensors.numpy.save_file(arrays, new, {"format": FORMAT, "checkpoint": json.dumps(plain)})
    with new.open("rb") as file:
        os.fsync(file.fileno())
    new.replace(path)


def load_checkpoint(path: Path) -> Checkpoint | None:
    """The checkpoint at `path`, or None where there is none; raises StoreError for a file that is not one."""
    if not path.exists():
        return None
    try:
        with safetensors.safe_open(path, "np") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise StoreError(f"{path} is no checkpoint of this version of fedqueue")
            plain = _Plain.model_validate_json(metadata["checkpoint"])
            model, state, ledger = (file.get_tensor(name) for name in ("model", "optimizer_state", "ledger"))
            if {tensor.dtype for tensor in (model, state, ledger)} != {np.dtype(np.uint8)} or model.ndim != 1:
                raise ValueError("its tensors are no bytes")
            records = unpack(ledger.tobytes(), sys.maxsize)  # a file of this machine's own, already in memory
            if not (isinstance(records, list) and all(isinstance(record, dict) for record in records)):
                raise ValueError("its ledger is no list of records")
            return Checkpoint(**dict(plain), model=model, optimizer_state=state.tobytes(), ledger=records)
    except (safetensors.SafetensorError, OSError, KeyError, ValueError, WireError) as error:
        raise StoreError(f"{path} cannot be read as a checkpoint: {error}") from error


class Checkpointer:
    """Saves one checkpoint at a time on a thread of its own; a slow disk makes them rarer, not the merging slower."""

    def __init__(self, path: Path, seconds: float) -> None:
        self.path = path
        self._seconds = seconds
        self._next = seconds
        self._thread: threading.Thread | None = None

    def due(self, now: float) -> bool:
        return bool(self._seconds) and now >= self._next and not (self._thread and self._thread.is_alive())

    def start(self, checkpoint: Checkpoint, now: float) -> None:
        """Save `checkpoint`, whose arrays nobody changes any more."""
        self.join()
        self._next = now + self._seconds
        self._thread = threading.Thread(target=self._save, args=(checkpoint,), name="checkpoint")
        self._thread.start()

    def join(self) -> None:
        if self._thread:
            self._thread.join()
            self._thread = None

    def delete(self) -> None:
        """The run is done: a later one of the same name starts from nothing."""
        self.join()
        self.path.unlink(missing_ok=True)

    def _save(self, checkpoint: Checkpoint) -> None:
        try:
            save_checkpoint(self.path, checkpoint)
        except OSError as error:
            log.warning("checkpoint not saved", path=str(self.path), error=str(error))
