"""Where an update's payload is received: in memory that is there anyway, as far as possible."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch

from fedqueue.tensors.codec import Codec
from fedqueue.tensors.frame import Delta
from fedqueue.transport.store import CHUNK, BlobBuffer
from fedqueue_coordinator.algorithms.aggregator import Accumulator, Aggregator
from fedqueue_coordinator.core.events import Load
from fedqueue_coordinator.service.coordinator_store import CoordinatorStore
from fedqueue_coordinator.service.streaming_payload import StreamedPayload


class PayloadReader:
    """Where updates are merged as they come: the empty accumulator's own memory, or one payload beside it.

    A plain payload of more than a chunk that finds the accumulator taken is not held at all (`streamed.py`). So a
    federation holds the model and one more, whatever is on its way. Where an aggregator keeps its updates, each has
    memory of its own.
    """

    def __init__(self, aggregator: Aggregator, accumulator: Accumulator, codec: Codec) -> None:
        self._aggregator, self._accumulator, self._codec = aggregator, accumulator, codec
        self._beside = np.empty(0, np.uint8)
        if codec.encoding and aggregator.takes_pieces:
            # An update of no parameters: its loop is compiled now, and not while the first update waits.
            codec.encoding.add(np.zeros(codec.encoding.size(0), np.uint8), torch.empty(0), 1.0, True)

    def receive(self, store: CoordinatorStore, load: Load) -> Delta:
        """The update; it is valid until it is merged or rejected.

        Raises as `CoordinatorStore.read_payload`, and WireError for what is none.
        """
        job, attempt, header = load.arrived.job, load.arrived.attempt, load.header
        place = self._place(header.nbytes)
        if place is None:
            read = partial(store.ahead.read_span, store.keys.payload(job, attempt))
            return StreamedPayload(self._codec.manifest, read, header.digest if store.identity else "")
        store.read_payload(job, attempt, header.digest, place)
        return self._codec.decode(place)

    def _place(self, nbytes: int) -> BlobBuffer | None:
        """Memory for a payload of at most `codec.largest` bytes; None where there is to be none."""
        if not self._aggregator.takes_pieces:
            return np.empty(nbytes, np.uint8)
        if self._codec.identity and self._accumulator.updates == 0:
            return self._accumulator.memory
        if self._codec.identity and nbytes > CHUNK:
            return None
        if self._beside.nbytes < nbytes:
            self._beside = np.empty(self._codec.largest, np.uint8)
        return self._beside[:nbytes]
