"""`fedqueue export`: a version of the model, out of Redis or out of a finished run's folder."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

from fedqueue.config import parse_config
from fedqueue.coordinator_store import CoordinatorStore
from fedqueue.errors import BlobMissing, RunNotFound, StoreError
from fedqueue.frame import Frame, Manifest
from fedqueue.payload import Codec, downward
from fedqueue.store import list_runs
from fedqueue_coordinator.places import finished_runs, read_summary, servers
from fedqueue_coordinator.results import save_model
from fedqueue_coordinator.server_state import MODEL, load_state

READINGS = 10  # attempts to read the exact model of a run that goes on


def export_model(url: str, run: str, version: int | None, output: Path) -> int:
    """Write the model to `output` and return its version; raises RunNotFound, or StoreError for a version gone."""
    for place in servers(url):
        if run not in list_runs(place.client):
            continue
        store = CoordinatorStore(place.client, run, owner="export")
        info = store.info()
        codec = downward(parse_config(info.config).compression, Manifest.unpack(info.manifest))
        if version is None:
            version, model = _newest(store, codec)
        else:
            try:
                model = store.read_model(version, codec)
            except BlobMissing:
                stored = ", ".join(map(str, store.stored_versions()))
                raise StoreError(f"version {version} of {run} is not stored any more; stored: {stored}") from None
        output.parent.mkdir(parents=True, exist_ok=True)
        save_model(output, model)
        return version
    folder = finished_runs().get(run)
    if folder is None:
        raise RunNotFound(run)
    kept: int = read_summary(folder)["model_version"]
    if version not in (None, kept):
        raise StoreError(f"run {run} has ended, and {folder} holds version {kept} only")
    output.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(folder / "model.safetensors", output)
    return kept


def _newest(store: CoordinatorStore, codec: Codec) -> tuple[int, Frame]:
    """The head, exact where what workers get of it is rounded; raises StoreError where it moves on too fast."""
    for _ in range(READINGS):
        version, model = store.newest_model(codec)
        if codec.encoding is None:
            return version, model
        with contextlib.suppress(StoreError):  # the head was replaced meanwhile, and its state deleted
            model.parameters.copy_(load_state(store.read_optimizer_state(version))[MODEL]["parameters"])
            return version, model
    raise StoreError(f"run {store.run!r} moves on faster than it can be read: name a --version, or wait for its end")
