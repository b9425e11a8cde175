"""An update that stays in Redis while it is merged: each pass reads it anew, so no model's worth of memory is taken."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import numpy as np
import torch

from fedqueue.errors import FedqueueError, SignatureError, StoreError
from fedqueue.protocol.signed_envelope import new_digest
from fedqueue.tensors.frame import PIECE, Frame, Manifest, Piece, add_pieces, align, slices
from fedqueue.transport.store import BlobBuffer


class PayloadChanged(FedqueueError):
    """A payload changed or went away after it was found sound: the accumulator holds a part of it."""


class StreamedPayload:
    """A `Delta`. The first pass over its pieces finds out whether it is what was signed, and every later one again.

    `read(start, into, whole)` fills `into` with the payload's bytes from `start` on, out of `whole`. The buffers and
    counters, which are few, are read at once. A pass raises StoreError for bytes that are not there, SignatureError for
    others than `digest` says (without one, than the first pass found), and Torn for either once a pass was sound.
    """

    def __init__(self, manifest: Manifest, read: Callable[[int, BlobBuffer, int], None], digest: str = "") -> None:
        self.manifest = manifest
        self._read, self._digest, self._sound = read, digest, False
        edge = 4 * manifest.parameters
        start = edge // 8 * 8  # so that the counters are aligned
        tail = np.empty(manifest.nbytes - start, np.uint8)
        read(start, tail, manifest.nbytes)
        self._tail = tail[edge - start :]
        self.buffers = torch.from_numpy(tail[edge - start : 4 * manifest.floats - start].view(np.float32))
        self.counters = torch.from_numpy(tail[align(4 * manifest.floats) - start :].view(np.int64))

    def pieces(self) -> Iterator[Piece]:
        try:
            yield from self._checked()
        except (StoreError, SignatureError) as error:
            if self._sound:
                raise PayloadChanged(f"the payload changed while it was merged: {error}") from error
            raise
        self._sound = True

    def add_to(self, into: torch.Tensor, weight: float, first: bool) -> None:
        add_pieces(self.pieces(), into, weight, first)

    def whole(self) -> Frame:
        frame = Frame(self.manifest, np.empty(self.manifest.nbytes, np.uint8))
        for where, values in self.pieces():
            frame.parameters[where] = values
        frame.buffer[4 * self.manifest.parameters :] = self._tail
        return frame

    def _checked(self) -> Iterator[Piece]:
        digest, parameters = new_digest(), self.manifest.parameters
        scratch: BlobBuffer = np.empty(4 * min(PIECE, parameters), np.uint8)
        for where in slices(parameters, PIECE):
            part = scratch[: 4 * (where.stop - where.start)]
            self._read(4 * where.start, part, self.manifest.nbytes)
            digest.update(cast(Any, part))
            yield where, torch.from_numpy(part.view(np.float32))
        digest.update(cast(Any, self._tail))
        found = digest.hexdigest()
        if found != (self._digest or found):
            raise SignatureError(f"its digest is {found[:12]}…, expected {self._digest[:12]}…")
        self._digest = found
