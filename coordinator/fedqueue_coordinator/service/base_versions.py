"""The versions that open jobs may have trained from, where merging needs them: kept as workers get them."""

from __future__ import annotations

from fedqueue.tensors.frame import Frame
from fedqueue.transport.store import BlobBuffer
from fedqueue_coordinator.core.federation import Federation
from fedqueue_coordinator.service.coordinator_store import CoordinatorStore


class BaseVersions:
    """Empty where `federation` needs none; else a copy of each version that is stored, once it was asked for."""

    def __init__(self, store: CoordinatorStore, federation: Federation) -> None:
        self._store, self._federation = store, federation
        self._frames: dict[int, Frame] = {}
        wire = federation.down.encode(federation.model, federation.version) if federation.needs_base else None
        self.published(set(store.stored_versions()), wire)

    def published(self, stored: set[int], wire: BlobBuffer | None) -> None:
        """The newest version travels as `wire`; of those before it, only `stored` may be a base from now on."""
        if self._federation.needs_base and wire is not None:
            self._frames = {version: frame for version, frame in self._frames.items() if version in stored}
            self._frames[self._federation.version] = self._federation.down.received(wire)

    def of(self, version: int) -> Frame:
        """Raises as `CoordinatorStore.read_model`."""
        if version not in self._frames:
            self._frames[version] = self._store.read_model(version, self._federation.down)
        return self._frames[version]
