"""A manifest: the names, dtypes, shapes and roles of a model's tensors, and their positions in a frame."""

from __future__ import annotations

import hashlib
import math
import sys
from dataclasses import dataclass
from functools import cached_property

import msgpack
import torch

from fedqueue.errors import ManifestMismatch, WireError
from fedqueue.protocol.msgpack import unpack

assert sys.byteorder == "little", "fedqueue's frames are little-endian: use a little-endian machine"

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
    """What a run's model consists of; the same on the coordinator and on every worker.

    >>> import torch
    >>> import fedqueue
    >>> manifest = fedqueue.Manifest.from_module(torch.nn.BatchNorm1d(4))
    >>> [entry.role for entry in manifest.entries]  # weight, bias, running_mean, running_var, num_batches_tracked
    ['parameter', 'parameter', 'buffer', 'buffer', 'counter']
    >>> manifest.parameters, manifest.floats, manifest.counters, manifest.nbytes
    (8, 16, 1, 72)
    """

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
        """The manifest as msgpack: for each tensor name, dtype, shape, offset, length and role."""
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


def align(nbytes: int) -> int:
    """The next multiple of 8."""
    return (nbytes + 7) // 8 * 8


def _describe(entry: TensorSpec | None) -> str:
    return f"{entry.role} {entry.dtype} {list(entry.shape)}" if entry else "missing"
