"""How many bytes the next piece of a transfer should have, by the speed that was measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fedqueue.tensors.blobs import CHUNK

PIECE_SECONDS = 2.0  # that a piece should take: a lost connection loses one piece
FIRST_PIECE = 256 * 1024  # bytes, before anything was measured
LEAST_PIECE, MOST_PIECE = 64 * 1024, CHUNK  # bytes
STEP = 4  # by which the size may change from one piece to the next


class LineSpeed:
    """One direction of a line; `piece` is the number of bytes that should take PIECE_SECONDS."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.piece = FIRST_PIECE
        self._clock = clock

    @contextmanager
    def measured(self, nbytes: int) -> Iterator[None]:
        """Measure the transfer of `nbytes` bytes inside the block, with its round trip; an exception shrinks pieces.

        A transfer of less than LEAST_PIECE bytes is mostly latency, and changes nothing.
        """
        began = self._clock()
        try:
            yield
        except Exception:
            self._set(self.piece // STEP)
            raise
        if nbytes >= LEAST_PIECE:
            seconds = max(self._clock() - began, 1e-6)
            self._set(min(round(nbytes * PIECE_SECONDS / seconds), max(nbytes, self.piece) * STEP))

    def _set(self, nbytes: int) -> None:
        self.piece = min(MOST_PIECE, max(LEAST_PIECE, self.piece // STEP, nbytes))
