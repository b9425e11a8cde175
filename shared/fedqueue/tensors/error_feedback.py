"""Error feedback: what a sparse encoding omits from an update is added to the client's next one.

With e the client's residual (0 at first), each job sends C(Δ + e) and keeps what C omitted (Stich et al., arXiv
1809.07599, algorithm 1). Over all its updates a client then sends the sum of its deltas, except for the last e:

    Σ sent + e = Σ Δ

A refused update leaves e unchanged: its delta is lost, as it is without compression, and the residual of earlier jobs
is kept.
"""

from __future__ import annotations

import math

import torch

from fedqueue.protocol.messages import Update
from fedqueue.tensors.blobs import chunks_of
from fedqueue.tensors.codec import Codec
from fedqueue.tensors.encodings import Bytes
from fedqueue.tensors.frame import Frame


class ErrorFeedback:
    """A worker process's codec for updates, with a residual in memory for each client: float32 [parameters]."""

    def __init__(self, codec: Codec) -> None:
        self.codec = codec
        self.residuals: dict[str, torch.Tensor] = {}

    @property
    def holds_back(self) -> bool:
        """Whether the encoding is sparse, so that there are residuals."""
        return self.codec.encoding is not None and self.codec.encoding.sparse

    def encode(self, client: str, frame: Frame, update: Update, seed: int) -> tuple[Update, Bytes]:
        """The header and the encoded payload of the client's update.

        With a sparse encoding, `frame` then contains the omitted values: the new residual, once `accepted` is called.
        """
        if client in self.residuals:
            frame.parameters.add_(self.residuals[client])
        wire = self.codec.encode(frame, seed)
        if self.holds_back:
            for where, values in self.codec.decode(wire).pieces():
                frame.parameters[where] -= values
        described = {"encoding": self.codec.name, "nbytes": wire.nbytes, "chunks": chunks_of(wire.nbytes)}
        return update.model_copy(update=described), wire

    def accepted(self, client: str, frame: Frame) -> None:
        """Keep what `encode` left in `frame` as the client's residual, because its update was accepted.

        A delta that is not finite leaves no residual; the coordinator refuses it.
        """
        if self.holds_back and math.isfinite(float(torch.linalg.vector_norm(frame.parameters))):
            self.residuals[client] = frame.parameters.clone()
