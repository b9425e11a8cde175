"""A model as one flat frame: a manifest and a contiguous buffer.

Layout of the buffer, little-endian: all parameters, then all floating buffers, as float32; padding to 8 bytes; then
all counters as int64. Inside a section, tensors have the order of `state_dict`. Wider and narrower floats (float64,
float16, bfloat16) are sent and aggregated as float32, and get their own dtype back when they are loaded.

A frame of a *model* contains values. A frame of an *update* contains local − base for the parameters, and the local
values for buffers and counters: a mean of running variances stays positive, a mean of their differences may not.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from fedqueue.errors import ManifestMismatch
from fedqueue.tensors.manifest import BUFFER, COUNTER, DTYPES, PARAMETER, Manifest, TensorSpec, align

PIECE = 1_048_576  # elements of a frame in one piece

Piece = tuple[slice | torch.Tensor, torch.Tensor]
"""A slice or int64 indices, and the float32 values there."""


class Delta(Protocol):
    """An update during its merge: a frame, or one that is still encoded (`codec.Encoded`) or still in Redis.

    `buffers`: float32; `counters`: int64, as in a frame.
    """

    manifest: Manifest
    buffers: torch.Tensor
    counters: torch.Tensor

    def pieces(self) -> Iterator[Piece]:
        """The parameters, piece by piece: a parameter in no piece is 0, and a piece is valid until the next one.

        Raises WireError for invalid encoded bytes, and StoreError if the update is read from Redis and incomplete.
        """

    def add_to(self, into: torch.Tensor, weight: float, first: bool) -> None:
        """into += weight · parameters, or with `first` into = weight · parameters; `into` is float32 [parameters].

        One pass, without memory for a second model. Raises as `pieces`, after having added a part.
        """

    def whole(self) -> Frame:
        """The whole update as a frame; the same object if it is a frame."""


class Frame:
    """One buffer of `manifest.nbytes` bytes, with views into it instead of copies.

    `floats`: float32 [manifest.floats]; `parameters`: its first [manifest.parameters]; `buffers`: the rest;
    `counters`: int64 [manifest.counters].

    >>> import torch
    >>> import fedqueue
    >>> model = torch.nn.Linear(2, 1)
    >>> frame = fedqueue.Frame(fedqueue.Manifest.from_module(model))
    >>> frame.read(model)
    >>> torch.equal(frame.parameters, torch.cat([model.weight.flatten(), model.bias]))
    True
    """

    def __init__(self, manifest: Manifest, buffer: npt.NDArray[np.uint8] | None = None) -> None:
        self.manifest = manifest
        self.buffer = np.zeros(manifest.nbytes, np.uint8) if buffer is None else buffer
        if self.buffer.nbytes != manifest.nbytes:
            raise ManifestMismatch(f"frame: {self.buffer.nbytes} bytes, expected {manifest.nbytes}")
        edge = align(4 * manifest.floats)
        self.floats = torch.from_numpy(self.buffer[: 4 * manifest.floats].view(np.float32))
        self.parameters = self.floats[: manifest.parameters]
        self.buffers = self.floats[manifest.parameters :]
        self.counters = torch.from_numpy(self.buffer[edge:].view(np.int64))

    def pieces(self) -> Iterator[Piece]:
        """As `Delta.pieces`."""
        for where in slices(len(self.parameters), PIECE):
            yield where, self.parameters[where]

    def add_to(self, into: torch.Tensor, weight: float, first: bool) -> None:
        """As `Delta.add_to`."""
        add_pieces(self.pieces(), into, weight, first)

    def whole(self) -> Frame:
        """As `Delta.whole`."""
        return self

    def copy(self) -> Frame:
        """A frame of the same manifest, with a copy of the buffer."""
        return Frame(self.manifest, self.buffer.copy())

    def read(self, model: torch.nn.Module) -> None:
        """Copy the module's tensors into the buffer."""
        state = model.state_dict()
        for entry, view in self._tensors:
            view.copy_(state[entry.name])

    def write(self, model: torch.nn.Module) -> None:
        """Copy the buffer into the module's tensors, of any device and dtype."""
        state = model.state_dict()
        with torch.no_grad():
            for entry, view in self._tensors:
                state[entry.name].copy_(view)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """A plain `state_dict`: new tensors of the model's own dtypes and shapes."""
        return {entry.name: view.to(DTYPES[entry.dtype], copy=True) for entry, view in self._tensors}

    @cached_property
    def _tensors(self) -> list[tuple[TensorSpec, torch.Tensor]]:
        """Every tensor as a view of its shape; cached, because a worker uses all of them twice in each job."""
        sections = {PARAMETER: self.floats, BUFFER: self.floats, COUNTER: self.counters}
        return [
            (entry, sections[entry.role][entry.offset : entry.offset + entry.length].reshape(entry.shape))
            for entry in self.manifest.entries
        ]


def make_update(local: Frame, base: Frame) -> Frame:
    """Turn `local`, a trained model, into its update against `base` in place; returns `local`."""
    local.parameters.sub_(base.parameters)
    return local


def add_pieces(pieces: Iterator[Piece], into: torch.Tensor, weight: float, first: bool) -> None:
    """`Delta.add_to` for pieces that are slices."""
    for where, values in pieces:
        if first:
            torch.mul(values, weight, out=into[where])
        else:
            into[where].add_(values, alpha=weight)


def slices(length: int, piece: int) -> Iterator[slice]:
    """Slices of at most `piece` elements that cover a vector of `length` elements."""
    return (slice(start, min(start + piece, length)) for start in range(0, length, piece))
