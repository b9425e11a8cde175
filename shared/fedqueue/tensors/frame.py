"""A model as one flat frame: a manifest and a contiguous buffer.

Layout of the buffer, little-endian: all parameters, then all floating buffers, as float32; padding to 8 bytes; then
all counters as int64. Inside a section the tensors stand in the order of `state_dict`. Wider and narrower floats
(float64, float16, bfloat16) travel and aggregate as float32 and go back to their own dtype when loaded.

A frame of a *model* holds values everywhere. A frame of an *update* holds local − base for the parameters, and the
local values for buffers and counters: a mean of running variances stays positive, a mean of their differences may not.
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import msgpack
import numpy as np
import numpy.typing as npt
import torch

from fedqueue.errors import ManifestMismatch, WireError
from fedqueue.protocol.messages import unpack

assert sys.byteorder == "little", "fedqueue's frames are little-endian; so far it runs on such machines only"

PARAMETER, BUFFER, COUNTER = "parameter", "buffer", "counter"
ROLES = (PARAMETER, BUFFER, COUNTER)
DTYPES = {
    str(d).removeprefix("torch."): d
    for d in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16,
        torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
    )
}  # fmt: skip
MAX_TENSORS = 100_000
MAX_NAME = 512
MAX_DIMENSIONS = 64
MAX_MANIFEST = 16 * 1024 * 1024  # bytes

PIECE = 1_048_576  # elements of a frame that are gone through at once

Piece = tuple[slice | torch.Tensor, torch.Tensor]
"""Where, a slice or int64 positions, and the float32 values there."""


@dataclass(frozen=True)
class TensorSpec:
    """One tensor: `offset` and `length` count elements within the section of its role's width."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    length: int
    role: str


@dataclass(frozen=True)
class Manifest:
    """What a run's model consists of; the same on the coordinator and on every worker."""

    entries: tuple[TensorSpec, ...]

    @cached_property
    def parameters(self) -> int:
        """Number of parameter elements: the first part of the float32 section."""
        return self._elements(PARAMETER)

    @cached_property
    def floats(self) -> int:
        """Number of elements of the float32 section: parameters, then buffers."""
        return self._elements(PARAMETER) + self._elements(BUFFER)

    @cached_property
    def counters(self) -> int:
        """Number of elements of the int64 section."""
        return self._elements(COUNTER)

    @cached_property
    def nbytes(self) -> int:
        """Size of a frame's buffer, in bytes."""
        return align(4 * self.floats) + 8 * self.counters

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the packed manifest, in hex."""
        return hashlib.sha256(self.pack()).hexdigest()

    def _elements(self, role: str) -> int:
        return sum(e.length for e in self.entries if e.role == role)

    @classmethod
    def from_module(cls, model: torch.nn.Module) -> Manifest:
        """The manifest of a module; raises ManifestMismatch for a dtype that cannot be federated."""
        trainable = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        tensors = {role: [] for role in ROLES}  # type: dict[str, list[tuple[str, torch.Tensor]]]
        for name, tensor in model.state_dict().items():
            if not isinstance(tensor, torch.Tensor) or str(tensor.dtype).removeprefix("torch.") not in DTYPES:
                kind = getattr(tensor, "dtype", type(tensor).__name__)
                raise ManifestMismatch(f"model: {name} is {kind}; known: {', '.join(DTYPES)}")
            floating = tensor.dtype.is_floating_point
            if name in trainable and not floating:
                raise ManifestMismatch(f"model: parameter {name} is {tensor.dtype}; parameters must be floating")
            tensors[PARAMETER if name in trainable else BUFFER if floating else COUNTER].append((name, tensor))
        entries, offset = [], 0
        for role in ROLES:
            if role == COUNTER:
                offset = 0
            for name, tensor in tensors[role]:
                dtype = str(tensor.dtype).removeprefix("torch.")
                entries.append(TensorSpec(name, dtype, tuple(tensor.shape), offset, tensor.numel(), role))
                offset += tensor.numel()
        if not tensors[PARAMETER]:
            raise ManifestMismatch("model: it has no parameters, so there is nothing to train")
        return cls(tuple(entries))

    def pack(self) -> bytes:
        rows = [[e.name, e.dtype, list(e.shape), e.offset, e.length, e.role] for e in self.entries]
        return msgpack.packb(rows)  # type: ignore[no-any-return]

    @classmethod
    def unpack(cls, data: bytes) -> Manifest:
        """The inverse of `pack`; raises WireError unless every count, name, shape, offset and role is consistent."""
        try:
            rows = unpack(data, MAX_MANIFEST)
            if len(rows) > MAX_TENSORS:
                raise WireError(f"{len(rows)} tensors, at most {MAX_TENSORS} are allowed")
            entries = tuple(TensorSpec(n, d, tuple(s), o, k, r) for n, d, s, o, k, r in rows)
        except (ValueError, TypeError, WireError) as error:
            raise WireError(f"manifest: not one of this protocol ({error})") from error
        expected = {PARAMETER: 0, COUNTER: 0}
        seen: set[str] = set()
        order = [ROLES.index(e.role) if e.role in ROLES else -1 for e in entries]
        if not entries or order != sorted(order) or -1 in order:
            raise WireError(f"manifest: roles must be {', '.join(ROLES)}, in that order")
        for e in entries:
            integers = (*e.shape, e.offset, e.length)
            if not isinstance(e.name, str) or e.name in seen or not isinstance(e.dtype, str) or e.dtype not in DTYPES:
                raise WireError(f"manifest: bad or repeated name or dtype: {e.name!r}, {e.dtype!r}")
            if len(e.name) > MAX_NAME or len(e.shape) > MAX_DIMENSIONS:
                raise WireError(f"manifest: a name of {len(e.name)} characters or {len(e.shape)} dimensions")
            if any(type(i) is not int or not 0 <= i < 2**48 for i in integers) or math.prod(e.shape) != e.length:
                raise WireError(f"manifest: {e.name}: bad shape {e.shape} or length {e.length}")
            if DTYPES[e.dtype].is_floating_point == (e.role == COUNTER):
                raise WireError(f"manifest: {e.name}: a {e.role} cannot be {e.dtype}")
            section = COUNTER if e.role == COUNTER else PARAMETER
            if e.offset != expected[section]:
                raise WireError(f"manifest: {e.name}: offset {e.offset}, expected {expected[section]}")
            expected[section] += e.length
            seen.add(e.name)
        return cls(entries)

    def require(self, other: Manifest) -> None:
        """Raise ManifestMismatch naming the first tensor in which `other` differs from this one."""
        mine = {e.name: e for e in self.entries}
        theirs = {e.name: e for e in other.entries}
        for name in {**mine, **theirs}:
            if mine.get(name) != theirs.get(name):
                raise ManifestMismatch(
                    f"model: {name} is {_describe(theirs.get(name))} here and {_describe(mine.get(name))} "
                    "in the run; both sides must build the same model from the same task"
                )
        if self.entries != other.entries:
            raise ManifestMismatch("model: the order of its tensors differs from the run's")


class Delta(Protocol):
    """An update as whoever merges it sees it: a frame, or one that is still encoded (`payload.Encoded`) or in Redis.

    `buffers`: float32; `counters`: int64, as in a frame.
    """

    manifest: Manifest
    buffers: torch.Tensor
    counters: torch.Tensor

    def pieces(self) -> Iterator[Piece]:
        """The parameters, piece by piece: those in no piece are 0, and a piece is valid until the next one.

        Raises WireError where the encoded bytes are none; one that is read from Redis meanwhile, StoreError, too.
        """

    def add_to(self, into: torch.Tensor, weight: float, first: bool) -> None:
        """into += weight · the parameters, or with `first` into = weight · them; `into` float32 [parameters].

        One pass without a second model's memory. Raises as `pieces`, with a part of it added.
        """

    def whole(self) -> Frame:
        """All of it as a frame; the same object where it is one."""


class Frame:
    """One buffer of `manifest.nbytes` bytes, and views into it that copy nothing.

    `floats`: float32 [manifest.floats]; `parameters`: its first [manifest.parameters]; `buffers`: the rest;
    `counters`: int64 [manifest.counters].
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
        for where in slices(len(self.parameters), PIECE):
            yield where, self.parameters[where]

    def add_to(self, into: torch.Tensor, weight: float, first: bool) -> None:
        add_pieces(self.pieces(), into, weight, first)

    def whole(self) -> Frame:
        return self

    def copy(self) -> Frame:
        return Frame(self.manifest, self.buffer.copy())

    def read(self, model: torch.nn.Module) -> None:
        """Copy the module's tensors into the buffer."""
        state = model.state_dict()
        for entry, place in self._tensors:
            place.copy_(state[entry.name])

    def write(self, model: torch.nn.Module) -> None:
        """Copy the buffer into the module's tensors, whatever their device and dtype."""
        state = model.state_dict()
        with torch.no_grad():
            for entry, place in self._tensors:
                state[entry.name].copy_(place)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """A plain `state_dict`: fresh tensors of the model's own dtypes and shapes."""
        return {entry.name: place.to(DTYPES[entry.dtype], copy=True) for entry, place in self._tensors}

    @cached_property
    def _tensors(self) -> list[tuple[TensorSpec, torch.Tensor]]:
        """Every tensor as a view of its shape, made once: a worker goes through all of them twice in each job."""
        sections = {PARAMETER: self.floats, BUFFER: self.floats, COUNTER: self.counters}
        return [
            (entry, sections[entry.role][entry.offset : entry.offset + entry.length].reshape(entry.shape))
            for entry in self.manifest.entries
        ]


def make_update(local: Frame, base: Frame) -> Frame:
    """Turn `local`, a trained model, into its update against `base`, in place; returns `local`."""
    local.parameters.sub_(base.parameters)
    return local


def add_pieces(pieces: Iterator[Piece], into: torch.Tensor, weight: float, first: bool) -> None:
    """What `Delta.add_to` does, for pieces that are slices."""
    for where, values in pieces:
        if first:
            torch.mul(values, weight, out=into[where])
        else:
            into[where].add_(values, alpha=weight)


def slices(length: int, piece: int) -> Iterator[slice]:
    """Slices of at most `piece` elements that cover a vector of that length."""
    return (slice(start, min(start + piece, length)) for start in range(0, length, piece))


def align(nbytes: int) -> int:
    """The next multiple of 8."""
    return (nbytes + 7) // 8 * 8


def _describe(entry: TensorSpec | None) -> str:
    return f"{entry.role} {entry.dtype} {list(entry.shape)}" if entry else "missing"
