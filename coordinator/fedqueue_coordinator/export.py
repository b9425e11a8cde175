"""`fedqueue export`: a version of the model, out of Redis or out of a finished run's folder."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from fedqueue.errors import BlobMissing, RunNotFound, StoreError
from fedqueue.frame import Frame, Manifest
from fedqueue.store import Store, list_runs
from fedqueue_coordinator.audit_signatures import verify_model
from fedqueue_coordinator.places import finished_runs, read_summary, servers
from fedqueue_coordinator.results import save_model


def export_model(url: str, run: str, version: int | None, output: Path, keys: Path = Path("keys")) -> tuple[int, str]:
    """Write the model to `output`; returns its version, and why it could not be verified (empty: it was, or need not).

    Raises RunNotFound, StoreError for a version gone, and SignatureError, before anything is written, for a model that
    is not what the coordinator signed, whose public key is in `keys`.
    """
    for place in servers(url):
        if run not in list_runs(place.client):
            continue
        store = Store(place.client, run)
        manifest = Manifest.unpack(store.info().manifest)
        if version is None:
            version, buffer = store.newest_model(manifest.nbytes)
        else:
            buffer = np.empty(manifest.nbytes, np.uint8)
            try:
                store.read_blob(store.keys.model(version), buffer)
            except BlobMissing:
                stored = ", ".join(map(str, store.stored_versions()))
                raise StoreError(f"version {version} of {run} is not stored any more; stored: {stored}") from None
        doubt = verify_model(store, store.info(), version, buffer, keys)
        output.parent.mkdir(parents=True, exist_ok=True)
        save_model(output, Frame(manifest, buffer))
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
