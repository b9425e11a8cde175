"""A model as one flat frame: a manifest and a contiguous buffer.

Layout of the buffer, little-endian:

    float32   all parameters, then all floating buffers       padding to 8 bytes
    float64   the floating buffers of that dtype
    int64     all counters
    uint8     the flags of an update: whether it changed the tensor, for each tensor with the rule `latest`

Inside a section, tensors have the order of their rules (`manifest.py`) and then that of the module. Parameters of other
float dtypes are aggregated as float32, and get their own dtype back when they are loaded.

A frame of a *model* contains values. A frame of an *update* contains local − base for the parameters, and the local
values for buffers and counters: a mean of running variances stays positive, a mean of their differences may not.

Frozen tensors are in no frame's buffer. A model's frames share one byte array of them, in their own dtypes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cached_property
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from fedqueue.errors import ManifestMismatch
from fedqueue.tensors.blobs import BlobBuffer, slices
from fedqueue.tensors.manifest import (
    COUNTER,
    DOUBLES,
    FLOATS,
    FROZEN,
    INTEGERS,
    PARAMETER,
    SECTIONS,
    Manifest,
    TensorSpec,
    align,
)
from fedqueue.tensors.module_tensors import (
    check_unchanged,
    is_extra_state,
    modules_with_extra_state,
    tensors_by_name,
    unwrapped,
)

PIECE = 1_048_576  # elements of a frame in one piece

Piece = tuple[slice | torch.Tensor, torch.Tensor]
"""A slice or int64 indices, and the float32 values there."""


class Delta(Protocol):
    """An update during its merge: a frame, or one that is still encoded (`codec.Encoded`) or still in Redis.

    `buffers`: float32; `doubles`: float64; `counters`: int64; `changed`: uint8, as in a frame.
    """

    manifest: Manifest
    buffers: torch.Tensor
    doubles: torch.Tensor
    counters: torch.Tensor
    changed: torch.Tensor

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
    `doubles`: float64 [manifest.doubles]; `counters`: int64 [manifest.counters]; `changed`: uint8 [manifest.flags], not
    0 where an update changed the tensor; `frozen`: uint8 [manifest.frozen_nbytes], None in an update.

    >>> import torch
    >>> import fedqueue
    >>> model = torch.nn.Linear(2, 1)
    >>> frame = fedqueue.Frame(fedqueue.Manifest.from_module(model))
    >>> frame.read(model)
    >>> torch.equal(frame.parameters, torch.cat([model.weight.flatten(), model.bias]))
    True
    """

    def __init__(
        self,
        manifest: Manifest,
        buffer: npt.NDArray[np.uint8] | None = None,
        frozen: BlobBuffer | None = None,
    ) -> None:
        self.manifest = manifest
        self.buffer = np.zeros(manifest.nbytes, np.uint8) if buffer is None else buffer
        if self.buffer.nbytes != manifest.nbytes:
            raise ManifestMismatch(f"frame: {self.buffer.nbytes} bytes, expected {manifest.nbytes}")
        if frozen is not None and frozen.nbytes != manifest.frozen_nbytes:
            raise ManifestMismatch(f"frame: {frozen.nbytes} bytes are frozen, expected {manifest.frozen_nbytes}")
        self.floats = torch.from_numpy(self.buffer[: 4 * manifest.floats].view(np.float32))
        self.parameters = self.floats[: manifest.parameters]
        self.buffers = self.floats[manifest.parameters :]
        self.doubles, self.counters, self.changed = split_tail(manifest, self.buffer[align(4 * manifest.floats) :])
        self.frozen = frozen
        self._verified = False

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
        """A frame of the same manifest, with a copy of the buffer; frozen tensors are shared."""
        return Frame(self.manifest, self.buffer.copy(), self.frozen)

    def read(self, model: torch.nn.Module) -> None:
        """Copy the module's tensors into the buffer, and its frozen ones too where the frame has none yet.

        Raises ManifestMismatch for a module of another manifest.
        """
        tensors = check_unchanged(model, self.manifest.frozen_by_name)
        self._copy_from(tensors, self._tensors)
        if self.frozen is None and self.manifest.frozen_nbytes:
            self.frozen = np.zeros(self.manifest.frozen_nbytes, np.uint8)
            self._copy_from(tensors, self._frozen_tensors())

    def read_update(self, model: torch.nn.Module, base: Frame) -> None:
        """Make this frame the update of `model`, which was trained from `base`.

        The delta of a parameter is against what the module held after `base.write`: `base` in the dtype of the
        parameter. Float64 parameters are subtracted in float64. What the training left unchanged, bit for bit, has a
        delta of 0 also where it is infinite, and a buffer keeps the bits that it has in `base`. Raises as `read`.
        """
        if self.frozen is None:
            self.frozen = base.frozen
        self.read(model)
        self.parameters.sub_(base.parameters)
        tensors = tensors_by_name(model) if self._inexact else {}
        for (entry, view), (_, before) in zip(self._inexact, base._inexact, strict=True):
            local = tensors[entry.name].detach().to("cpu")
            held = before.to(entry_dtype(entry))
            same = same_elements(local, held)
            if entry.role == PARAMETER:
                wide = torch.promote_types(entry_dtype(entry), torch.float32)
                view.copy_((local.to(wide) - held.to(wide)).masked_fill_(same, 0.0))
            else:
                view.copy_(torch.where(same, before, local.to(view.dtype)))
        if len(base.infinite_parameters):
            self._clear_unchanged_infinities(model, base)
        if self.manifest.flags:
            self._mark_changes(base)

    def write(self, model: torch.nn.Module) -> None:
        """Copy the buffer and the frozen tensors into the module's tensors, of any device and dtype.

        The first call checks that the module then holds them. Raises ManifestMismatch if it does not, and for a module
        of another manifest.
        """
        if self.manifest.frozen_nbytes and self.frozen is None:
            raise ManifestMismatch("frame: it has no frozen tensors, so it is an update and no model")
        tensors = tensors_by_name(model)
        written = self._with_values(tensors)
        extra = modules_with_extra_state(unwrapped(model)) if self._has_extra_state else {}
        with torch.no_grad():
            torch._foreach_copy_(
                [tensor for name, tensor, _ in written if name not in extra],
                [view for name, _, view in written if name not in extra],
            )
            for name, tensor, view in written:
                if name in extra:
                    extra[name].set_extra_state(view.to(tensor.device, tensor.dtype, copy=True))
        if not self._verified:
            for name, tensor, view in self._with_values(tensors_by_name(model)) if extra else written:
                if not bool(same_elements(tensor.detach().to("cpu"), view.to(tensor.dtype)).all()):
                    raise ManifestMismatch(
                        f"model: {name} does not hold what was written into it ({type(tensor).__name__} of "
                        f"{tensor.dtype}): replace it with a plain parameter or buffer"
                    )
            self._verified = True

    def state_dict(self) -> dict[str, torch.Tensor]:
        """A plain `state_dict`: new tensors of the model's own names, dtypes and shapes; tied names share one."""
        if self.manifest.frozen_nbytes and self.frozen is None:
            raise ManifestMismatch("frame: it has no frozen tensors, so it is an update and no model")
        state = {}
        for entry, view in [*self._tensors, *self._frozen_tensors()]:
            tensor = view.to(entry_dtype(entry), copy=True)
            state.update(dict.fromkeys(entry.saved_names, tensor))
        return state

    def _with_values(self, tensors: dict[str, torch.Tensor]) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
        """Name, tensor of the module, and view of this frame, for every tensor.

        A move to another device can separate the names of a tied tensor: then each has a row.
        """
        pairs: list[tuple[str, torch.Tensor, torch.Tensor]] = []
        for entry, view in [*self._tensors, *self._frozen_tensors()]:
            first, *others = (_of_shape(tensors, name, entry) for name in entry.names)
            pairs.append((entry.name, first, view))
            pairs += [(entry.name, other, view) for other in others if other is not first]
        return pairs

    @cached_property
    def infinite_parameters(self) -> torch.Tensor:
        """Indices of the parameters that are not finite, int64: the same in every version, as no update changes them.

        A finite norm rules them out without the memory of a mask.
        """
        if math.isfinite(float(torch.linalg.vector_norm(self.parameters))):
            return torch.empty(0, dtype=torch.int64)
        return torch.nonzero(~torch.isfinite(self.parameters)).flatten()

    @cached_property
    def _has_extra_state(self) -> bool:
        return any(is_extra_state(entry.name) for entry in self.manifest.entries)

    @cached_property
    def _tensors(self) -> list[tuple[TensorSpec, torch.Tensor]]:
        """Every tensor but the frozen ones as a view; cached, because a worker uses all of them twice in each job."""
        entries = [entry for entry in self.manifest.entries if entry.role != FROZEN]
        whole = {FLOATS: self.floats, DOUBLES: self.doubles, INTEGERS: self.counters}
        of_section = {name: [e.length for e in entries if _section(e) == name] for name in whole}
        parts = [part for name, lengths in of_section.items() for part in torch.split(whole[name], lengths)]
        return [
            (entry, part if len(entry.shape) == 1 else part.view(entry.shape))
            for entry, part in zip(entries, parts, strict=True)
        ]

    @cached_property
    def _inexact(self) -> list[tuple[TensorSpec, torch.Tensor]]:
        """The tensors whose values in this frame may differ from those that the module holds, by rounding."""
        return [(e, view) for e, view in self._tensors if e.role != COUNTER and entry_dtype(e) != view.dtype]

    def _frozen_tensors(self) -> list[tuple[TensorSpec, torch.Tensor]]:
        if self.frozen is None:
            return []
        return [(entry, _frozen_view(self.frozen, entry)) for entry in self.manifest.entries if entry.role == FROZEN]

    def _copy_from(self, tensors: dict[str, torch.Tensor], views: list[tuple[TensorSpec, torch.Tensor]]) -> None:
        for entry, _ in views:
            if tensors[entry.name].is_meta:
                raise ManifestMismatch(f"model: training has left {entry.name} on the meta device, without values")
            if (shape := tensors[entry.name].shape) != entry.shape:
                raise ManifestMismatch(
                    f"model: training has changed {entry.name} from shape {list(entry.shape)} to {list(shape)}: give "
                    "it its final shape in model(), for example with one batch"
                )
        sources = [tensors[entry.name] for entry, _ in views]
        with torch.no_grad():
            torch._foreach_copy_([view for _, view in views], sources)

    def _clear_unchanged_infinities(self, model: torch.nn.Module, base: Frame) -> None:
        """Set the delta of a parameter to 0 where the base is not finite and the training left it as it was."""
        odd = base.infinite_parameters
        local = Frame(self.manifest, frozen=self.frozen)
        local.read(model)
        same = same_elements(local.parameters[odd], base.parameters[odd])
        self.parameters[odd[same]] = 0.0

    def _mark_changes(self, base: Frame) -> None:
        """Set the flags of the tensors with the rule `latest` whose bits differ from those of `base`."""
        for section in SECTIONS:
            if latest := self.manifest.latest(section):
                mine, theirs = (getattr(frame, section)[latest.elements] for frame in (self, base))
                differs = torch.cat([torch.zeros(1, dtype=torch.int64), (~same_elements(mine, theirs)).cumsum(0)])
                lengths = torch.tensor(latest.lengths)
                ends = lengths.cumsum(0)
                self.changed[latest.flags] = (differs[ends] > differs[ends - lengths]).to(torch.uint8)


def add_pieces(pieces: Iterator[Piece], into: torch.Tensor, weight: float, first: bool) -> None:
    """`Delta.add_to` for pieces that are slices."""
    for where, values in pieces:
        if first:
            torch.mul(values, weight, out=into[where])
        else:
            into[where].add_(values, alpha=weight)


def same_elements(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Where two tensors of one dtype have the same bits: bool, of their shape."""
    bits = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}[a.element_size()]
    return a.contiguous().view(bits) == b.contiguous().view(bits)


def _section(entry: TensorSpec) -> str:
    return FLOATS if entry.role == PARAMETER else entry.section


def entry_dtype(entry: TensorSpec) -> torch.dtype:
    """The dtype of a tensor in its module."""
    dtype: torch.dtype = getattr(torch, entry.dtype)
    return dtype


def split_tail(manifest: Manifest, tail: BlobBuffer) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The float64 buffers, the counters and the flags in the last `manifest.tail_nbytes` bytes of a frame, as views."""
    first, second = 8 * manifest.doubles, 8 * (manifest.doubles + manifest.counters)
    return (
        torch.from_numpy(tail[:first].view(np.float64)),
        torch.from_numpy(tail[first:second].view(np.int64)),
        torch.from_numpy(tail[second : second + manifest.flags]),
    )


def _frozen_view(frozen: BlobBuffer, entry: TensorSpec) -> torch.Tensor:
    dtype = entry_dtype(entry)
    data = torch.from_numpy(frozen[entry.offset : entry.offset + entry.length * dtype.itemsize])
    return data.view(dtype).reshape(entry.shape)


def _of_shape(tensors: dict[str, torch.Tensor], name: str, entry: TensorSpec) -> torch.Tensor:
    tensor = tensors.get(name)
    if tensor is None or tensor.shape != entry.shape:
        shape = "missing" if tensor is None else f"of shape {list(tensor.shape)}"
        raise ManifestMismatch(f"model: {name} is {shape}, the run's is of shape {list(entry.shape)}")
    return tensor
