"""What a worker posts, and what it holds back for the client's next update: error feedback.

With e the client's residual (0 at first), each job sends C(Δ + e) and keeps what C left out (Stich et al., arXiv
1809.07599, algorithm 1). Over all its updates a client then sends the sum of its deltas, but for the last e:

    Σ sent + e = Σ Δ

An update that Redis did not take leaves e as it was before: its delta counts for nothing, as it does without
compression, and what earlier jobs owe is still owed.
"""

from __future__ import annotations

import math

import torch

from fedqueue.protocol.messages import Update
from fedqueue.tensors.codec import Codec
from fedqueue.tensors.encodings import Bytes
from fedqueue.tensors.frame import Frame
from fedqueue.transport.store import chunks_of


class ErrorFeedback:
    """The codec of one process's updates, with the residuals of its clients: float32 [parameters] each, in memory."""

    def __init__(self, codec: Codec) -> None:
        self.codec = codec
        self.residuals: dict[str, torch.Tensor] = {}

    @property
    def holds_back(self) -> bool:
        return self.codec.encoding is not None and self.codec.encoding.sparse

    def encode(self, client: str, frame: Frame, update: Update, seed: int) -> tuple[Update, Bytes]:
        """The client's update as it travels, with a header that says so.

        Of `frame`, what is held back is left (nothing is, where nothing is left out): it is the residual once
        `accepted` says so.
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
        """The update was taken: what `encode` left of `frame` is added to the client's next one.

        A delta that is not finite is refused by the coordinator, and leaves no residual.
        """
        if self.holds_back and math.isfinite(float(torch.linalg.vector_norm(frame.parameters))):
            self.residuals[client] = frame.parameters.clone()
