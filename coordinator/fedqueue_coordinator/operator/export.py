"""`fedqueue export`: a version of the model, out of Redis or out of a finished run's folder."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

from fedqueue.config.loading import parse_config
from fedqueue.errors import BlobMissing, RunNotFound, StoreError
from fedqueue.tensors.codec import Codec, downward
from fedqueue.tensors.frame import Manifest
from fedqueue.transport.store import BlobBuffer, list_runs
from fedqueue_coordinator.core.server_state import MODEL, load_state
from fedqueue_coordinator.operator.audit.signatures import verify_model
from fedqueue_coordinator.operator.results import save_model
from fedqueue_coordinator.operator.run_locations import finished_runs, read_summary, servers
from fedqueue_coordinator.service.coordinator_store import CoordinatorStore

READ_ATTEMPTS = 10  # attempts to read the exact model of a run that goes on


def export_model(url: str, run: str, version: int | None, output: Path, keys: Path = Path("keys")) -> tuple[int, str]:
    """Write the model to `output`; returns its version, and why it could not be verified (empty: it was, or need not).

    Raises RunNotFound, StoreError for a version gone, and SignatureError, before anything is written, for a model that
    is not what the coordinator signed, whose public key is in `keys`.
    """
    for place in servers(url):
        if run not in list_runs(place.client):
            continue
        store = CoordinatorStore(place.client, run, owner="export")
        info = store.info()
        codec = downward(parse_config(info.config).compression, Manifest.unpack(info.manifest))
        state: bytes | None = None
        if version is None:
            version, wire, state = _newest(store, codec)
        else:
            try:
                wire = store.read_wire(version, codec)
            except BlobMissing:
                stored = ", ".join(map(str, store.stored_versions()))
                raise StoreError(f"version {version} of {run} is not stored any more; stored: {stored}") from None
        doubt = verify_model(store, store.info(), version, wire, keys, state)
        model = codec.decode(wire).whole()
        if state is not None:
            model.parameters.copy_(load_state(state)[MODEL]["parameters"])
        output.parent.mkdir(parents=True, exist_ok=True)
        save_model(output, model)
        return version, doubt
    folder = finished_runs().get(run)
    if folder is None:
        raise RunNotFound(run)
    kept: int = read_summary(folder)["model_version"]
    if version not in (None, kept):
        raise StoreError(f"run {run} has ended, and {folder} holds version {kept} only")
    output.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(folder / "model.safetensors", output)
    return kept, ""


def _newest(store: CoordinatorStore, codec: Codec) -> tuple[int, BlobBuffer, bytes | None]:
    """The head as it is stored and, where it is rounded, the server's state, which has the exact one.

    Raises StoreError where it moves on too fast.
    """
    for _ in range(READ_ATTEMPTS):
        version = store.info().version
        with contextlib.suppress(StoreError):  # the head was replaced meanwhile, and it or its state deleted
            wire = store.read_wire(version, codec)
            return version, wire, store.read_optimizer_state(version) if codec.encoding else None
    raise StoreError(f"run {store.run!r} moves on faster than it can be read: name a --version, or wait for its end")
