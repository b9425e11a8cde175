"""What a client does with its update in a run with keepers before it leaves: clip, round, mask, and seal the seeds.

Shared by the workers and the simulation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import structlog

from fedqueue.config.schema import Config
from fedqueue.errors import TaskError
from fedqueue.protocol.messages import MaskedUpdate, Order, SealedSeed, Update
from fedqueue.protocol.signed_envelope import Scope, digest_of
from fedqueue.secure.masks import ROUNDING, MaskStream, add_masks, new_seed
from fedqueue.secure.ring import examples_share, ring_of
from fedqueue.secure.seed_envelope import agreed_terms, key_id, seal_seed, seed_info
from fedqueue.tensors.blobs import BlobBuffer, chunks_of
from fedqueue.tensors.codec import update_codec
from fedqueue.tensors.frame import Frame
from fedqueue.tensors.manifest import Manifest

log = structlog.get_logger("fedqueue.worker")


@dataclass(frozen=True)
class Attempt:
    """The attempt that an update belongs to; a seed that is moved to another one cannot be opened."""

    scope: Scope
    number: int
    base: int
    """The version that the update was trained from."""
    model: str
    """The digest of that version as the client received it."""


class Masking:
    """Masks the updates of one run."""

    def __init__(self, config: Config, manifest: Manifest) -> None:
        """`config` is the run's; raises as `ring_of`."""
        self._config = config
        self._manifest = manifest
        self._terms = agreed_terms(config)
        self._ring = ring_of(config, manifest)
        self._codec = update_codec(config, manifest)

    @property
    def keepers(self) -> Sequence[str]:
        """The run's keepers, in the order of their components."""
        return self._config.secure.keepers

    @property
    def hides_examples(self) -> bool:
        """Whether no message tells how many examples a client has."""
        return self._config.secure.hides_examples

    def mask(
        self, update: Update, delta: Frame, order: Order, attempt: Attempt, keys: Sequence[bytes]
    ) -> tuple[MaskedUpdate, BlobBuffer]:
        """The header and the payload of a masked update, which may lie in the memory of `delta`.

        `keys` are the public encryption keys of the keepers. Rounding depends on the order's seed, and the masks on the
        operating system's generator. A header has no metrics: those of one client tell about its rows. It says 0
        examples where their number is hidden.

        With client privacy, an update that is not finite counts as zero. Otherwise it raises TaskError, and so does one
        without examples whose number is hidden. The coordinator cannot find out either.
        """
        if self.hides_examples and update.examples == 0:
            raise TaskError("the training has used no examples, so nothing is sent")
        values = delta.parameters.numpy()
        rounding, share = (
            MaskStream(order.seed.to_bytes(8, "little"), ROUNDING),
            examples_share(update.examples, self._config),
        )
        try:
            quantized = self._ring.quantize(values, rounding.next_into, share)
        except ValueError:
            if self._config.privacy.clients.on:  # an ending as failed would depend on the rows, and no noise covers it
                log.warning(
                    "the training has made a parameter NaN or infinite: the update counts as zero, and only this log "
                    "says so; lower training.learning_rate", client=order.client, job=order.job,
                )  # fmt: skip
                values.fill(0)
                return self.mask(update, delta, order, attempt, keys)
            bad = self._manifest.parameter_at(int(np.flatnonzero(~np.isfinite(values))[0])).name
            raise TaskError(
                f"the training has made {bad} NaN or infinite, so nothing is sent: lower training.learning_rate, or "
                "limit the gradients by training.max_grad_norm"
            ) from None
        if self._ring.counts_examples:
            quantized = np.append(quantized, np.int32(self._ring.count(share)))
        seeds = [new_seed() for _ in self.keepers]
        payload = add_masks(quantized, seeds).view(np.uint8)
        digest = digest_of(payload)
        sealed = []
        for component, (keeper, key, seed) in enumerate(zip(self.keepers, keys, seeds, strict=True)):
            info = seed_info(
                attempt.scope, self._terms, order.client, order.job, attempt.number, attempt.base, attempt.model,
                digest, component, keeper, self._ring.words,
            )  # fmt: skip
            envelope = seal_seed(seed, key, info)
            sealed.append(SealedSeed(component=component, keeper=keeper, key=key_id(key), sealed=envelope))
        header = MaskedUpdate(
            examples=0 if self.hides_examples else update.examples,
            encoding=self._codec.name,
            nbytes=payload.nbytes,
            chunks=chunks_of(payload.nbytes),
            seconds=update.seconds,
            digest=digest,
            traceparent=update.traceparent,
            model=attempt.model,
            seeds=tuple(sealed),
        )
        return header, payload
