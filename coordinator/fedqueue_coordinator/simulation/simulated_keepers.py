"""The keepers of a simulated run: pure ones, in memory, that answer at once.

Clients mask and encrypt as they do for real, and the keepers refuse what real ones refuse. Nothing is signed, because
no message leaves the process. The masks cancel out, and the dithers are drawn from the run's seed and the version: so
equal simulations have equal bits.
"""

from __future__ import annotations

import hashlib

import numpy as np

from fedqueue.config.schema import Config
from fedqueue.protocol.messages import MaskRefused, Order, Update
from fedqueue.protocol.signed_envelope import Scope, digest_of
from fedqueue.secure.keeper import Keeper, MemoryLog, Unverified
from fedqueue.secure.masked_update import Attempt, Masking
from fedqueue.secure.masks import new_seed
from fedqueue.secure.seed_envelope import KeeperPrivateKey
from fedqueue.tensors.blobs import BlobBuffer
from fedqueue.tensors.frame import Frame
from fedqueue.tensors.manifest import Manifest
from fedqueue_coordinator.core.events import (
    CohortRefused,
    Event,
    MasksReleased,
    Offer,
    Unmask,
    UpdateOpened,
    WholeWords,
)


class SimulatedKeepers:
    """All keepers of one run, and the masking of its clients."""

    def __init__(self, config: Config, manifest: Manifest) -> None:
        """Raises ConfigurationError as `ring_of`."""
        self._masking = Masking(config, manifest)
        self._scope, self._seed = Scope(config.name, "simulation"), config.seed
        self._keepers = [
            Keeper(
                name, config, manifest.parameters, self._scope, Unverified(), MemoryLog(), KeeperPrivateKey.generate(),
                new_seed(),
            )
            for name in config.secure.keepers
        ]  # fmt: skip

    def mask(self, update: Update, delta: Frame, order: Order, base: int, model: str) -> tuple[Update, BlobBuffer]:
        """The header and payload of a masked update, in the memory of `delta`; raises as `Masking.mask`."""
        keys = [keeper.key.public for keeper in self._keepers]
        return self._masking.mask(update, delta, order, Attempt(self._scope, 1, base, model), keys)

    def answer(self, asked: Offer | Unmask) -> list[Event]:
        """What the keepers say to an offer or to a cohort, in their order."""
        if isinstance(asked, Offer):
            answers = [(keeper.name, keeper.offer(asked.offer)) for keeper in self._keepers]
            return [UpdateOpened(name, said.header, said.refusal, said.detail) for name, said in answers]
        return [self._released(keeper, asked.cohort.pack()) for keeper in self._keepers]

    def _released(self, keeper: Keeper, cohort: bytes) -> Event:
        released = keeper.release(cohort)
        if isinstance(released, MaskRefused):
            return CohortRefused(keeper.name, released.reason, released.detail, frozenset(released.headers))
        dither = hashlib.sha256(f"{self._seed} {keeper.name} {released.version}".encode()).digest()
        words = np.concatenate([piece.copy() for piece in released.dithered_by(dither).pieces()])
        digest = digest_of(words.view(np.uint8))
        return MasksReleased(keeper.name, released.cohort, WholeWords(words), {"digest": digest})
