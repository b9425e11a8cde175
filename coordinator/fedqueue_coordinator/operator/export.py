"""`fedqueue export`: writes a version of the model, from Redis or from the folder of a finished run."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

from safetensors import SafetensorError, safe_open

from fedqueue.config.loading import parse_config
from fedqueue.errors import BlobMissing, RunNotFound, StoreError
from fedqueue.tensors.blobs import BlobBuffer
from fedqueue.tensors.codec import Codec, downlink_codec
from fedqueue.tensors.manifest import Manifest
from fedqueue.transport.store import list_runs
from fedqueue_coordinator.core.server_state import MODEL, load_state
from fedqueue_coordinator.operator.audit.signatures import verify_model
from fedqueue_coordinator.operator.results import replaced, save_model
from fedqueue_coordinator.operator.runs import finished_runs, reachable_servers, read_summary
from fedqueue_coordinator.service.coordinator_store import CoordinatorStore

READ_ATTEMPTS = 10
"""Attempts to read the newest version of a run in progress."""


def export_model(url: str, run: str, version: int | None, output: Path, keys: Path = Path("keys")) -> tuple[int, str]:
    """Write the model to `output` as safetensors; returns its version, and why it could not be verified.

    The second value is empty if the model was verified, or comes from a folder of results, where nothing is signed.
    `version` None means the newest. `keys` is the folder with the coordinator's public key. Raises RunNotFound,
    StoreError for a version that is not stored, and SignatureError for a model that differs from the one that the
    coordinator signed; in all three cases nothing is written. Raises ConfigurationError, before the model is read, for
    an `output` that cannot be written or is no model.
    """
    for client in reachable_servers(url):
        if run not in list_runs(client):
            continue
        with replaced(output) as new:
            return _write_from_redis(CoordinatorStore(client, run, owner="export"), version, new, keys)
    folder = finished_runs().get(run)
    if folder is None:
        raise RunNotFound(run)
    kept: int = read_summary(folder, "model_version")["model_version"]
    if version not in (None, kept):
        raise StoreError(f"run {run} has ended, and {folder} holds only version {kept}")
    model = folder / "model.safetensors"
    _require_whole(model)
    with replaced(output) as new:
        shutil.copyfile(model, new)
    return kept, ""


def _require_whole(model: Path) -> None:
    """Raise StoreError unless the file has all the bytes that its header announces."""
    try:
        with safe_open(model, framework="pt"):
            pass
    except (OSError, SafetensorError) as error:
        raise StoreError(f"{model} cannot be read ({error}); restore it from a backup, or repeat the run") from None


def _write_from_redis(store: CoordinatorStore, version: int | None, path: Path, keys: Path) -> tuple[int, str]:
    info = store.info()
    codec = downlink_codec(parse_config(info.config).compression, Manifest.unpack(info.manifest))
    frozen = store.read_frozen(codec.manifest.frozen_nbytes)
    state: bytes | None = None
    if version is None:
        version, wire, state = _read_newest(store, codec)
    else:
        try:
            wire = store.read_wire(version, codec)
        except BlobMissing:
            stored = ", ".join(map(str, store.stored_versions()))
            raise StoreError(
                f"version {version} of {store.run} is no longer stored; stored versions: {stored}"
            ) from None
    unverified = verify_model(store, store.info(), version, wire, keys, state, frozen)
    model = codec.decode(wire).whole()
    model.frozen = frozen
    if state is not None:
        model.parameters.copy_(load_state(state)[MODEL]["parameters"])
    save_model(path, model)
    return version, unverified


def _read_newest(store: CoordinatorStore, codec: Codec) -> tuple[int, BlobBuffer, bytes | None]:
    """Read the newest version as stored and, if it is rounded, the server's state, which has the exact parameters.

    Raises StoreError if new versions replace it faster than it can be read.
    """
    for _ in range(READ_ATTEMPTS):
        version = store.info().version
        with contextlib.suppress(StoreError):  # a newer version was committed, and this one or its state was deleted
            wire = store.read_wire(version, codec)
            return version, wire, store.read_optimizer_state(version) if codec.encoding else None
    raise StoreError(
        f"run {store.run!r} makes versions faster than one can be read; pass --version V, or export after it has ended"
    )
