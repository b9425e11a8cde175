"""Where an update's payload is received: in memory that is there anyway, as far as possible."""

from __future__ import annotations

import numpy as np

from fedqueue.payload import Codec
from fedqueue.store import BlobBuffer
from fedqueue_coordinator.aggregation import Accumulator, Aggregator


class Landing:
    """Where updates are merged as they come: the empty accumulator's own memory, and one payload beside it.

    So a federation that merges one by one holds the model and one more, a buffered one two more, whatever is on its
    way. Where an aggregator keeps its updates, each has memory of its own.
    """

    def __init__(self, aggregator: Aggregator, accumulator: Accumulator, codec: Codec) -> None:
        self._aggregator, self._accumulator, self._codec = aggregator, accumulator, codec
        self._beside = np.empty(0, np.uint8)

    def place(self, nbytes: int) -> BlobBuffer:
        """Memory for a payload of at most `codec.largest` bytes, as long as it takes to merge or reject it."""
        if not self._aggregator.takes_pieces:
            return np.empty(nbytes, np.uint8)
        if self._codec.identity and self._accumulator.updates == 0:
            return self._accumulator.memory
        if self._beside.nbytes < nbytes:
            self._beside = np.empty(self._codec.largest, np.uint8)
        return self._beside[:nbytes]
