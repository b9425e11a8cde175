"""A manifest: the names, dtypes, shapes, roles and rules of a model's tensors, and their positions in a frame.

| role | tensors | in a frame |
|---|---|---|
| `parameter` | parameters with `requires_grad` | float32 |
| `buffer` | floating buffers | float32; float64 for float64 |
| `counter` | integer and boolean buffers | int64 |
| `frozen` | parameters without `requires_grad`, buffers with the rule `frozen` | not there: sent once, as they are |

A rule says how a version takes over the values of buffers and counters. Without one (the empty string), a buffer is a
running statistic, which `aggregation.running_statistics` merges, and a counter takes the maximum.
"""

from __future__ import annotations

import fnmatch
import hashlib
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import msgpack

from fedqueue.config.aggregation import AggregationConfig
from fedqueue.errors import ConfigurationError, ManifestMismatch, WireError
from fedqueue.protocol.msgpack import unpack

if TYPE_CHECKING:
    import torch

    from fedqueue.tensors.module_tensors import ModuleTensor

assert sys.byteorder == "little", "fedqueue's frames are little-endian: use a little-endian machine"

PARAMETER, BUFFER, COUNTER, FROZEN = "parameter", "buffer", "counter", "frozen"
ROLES = (PARAMETER, BUFFER, COUNTER, FROZEN)
MEAN, MAX, LATEST = "mean", "max", "latest"
RULES = {PARAMETER: ("",), BUFFER: ("", MEAN, MAX, LATEST), COUNTER: ("", LATEST), FROZEN: ("",)}
"""Role → the rules of its tensors, in the order in which a section has them."""
FLOATS, DOUBLES, INTEGERS = "buffers", "doubles", "counters"
SECTIONS = (FLOATS, DOUBLES, INTEGERS)
"""The sections of buffers, by the names that `Frame` and `Delta` have for them: float32, float64 and int64."""
STATISTICS = ("running_mean", "running_var", "running_std", "moving_mean", "moving_var", "moving_std")
"""Names of floating buffers that are running statistics by default."""
COUNTERS = ("num_*", "*count", "*counter", "*step", "*steps")
"""Patterns of names of integer buffers that take the maximum by default; `num_batches_tracked` is BatchNorm's."""
FLOATING = ("float64", "float32", "float16", "bfloat16")
DTYPES = dict(zip(FLOATING, (8, 4, 2, 2), strict=True)) | {
    "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1, "bool": 1,
}  # fmt: skip
"""Name of a dtype in torch → bytes of an element. A keeper reads a manifest, and does without torch."""
MAX_TENSORS = 100_000
MAX_NAME = 512
MAX_DIMENSIONS = 64
MAX_MANIFEST = 16 * 1024 * 1024  # bytes


MAX_NAMES = 4096  # of one tensor


@dataclass(frozen=True)
class TensorSpec:
    """One tensor: `offset` counts elements within its section, for a frozen tensor bytes; `length` counts elements."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    length: int
    role: str
    rule: str = ""
    aliases: tuple[str, ...] = ()
    """Further names of the same tensor in the module: it is tied."""
    keys: tuple[str, ...] = ()
    """Its names in `state_dict()`; empty where they are `names`."""

    @property
    def names(self) -> tuple[str, ...]:
        """All names of the tensor in the module."""
        return (self.name, *self.aliases)

    @property
    def saved_names(self) -> tuple[str, ...]:
        """All names of the tensor in `state_dict()` and in the file of results."""
        return self.keys or self.names

    @property
    def section(self) -> str:
        """The section of a buffer or counter: one of SECTIONS."""
        if self.role == COUNTER:
            return INTEGERS
        return DOUBLES if self.dtype == "float64" else FLOATS


@dataclass(frozen=True)
class LatestTensors:
    """The tensors of one section that have the rule `latest`: consecutive elements, and one flag each."""

    elements: slice
    flags: slice
    """Their flags in `Frame.changed`."""
    lengths: tuple[int, ...]
    """The number of elements of each tensor."""


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
        return sum(e.length for e in self.entries if e.role == PARAMETER)

    @cached_property
    def floats(self) -> int:
        """Number of elements of the float32 section: parameters, then buffers."""
        return self.parameters + self._in_section(FLOATS)

    @cached_property
    def doubles(self) -> int:
        """Number of elements of the float64 section."""
        return self._in_section(DOUBLES)

    @cached_property
    def counters(self) -> int:
        """Number of elements of the int64 section."""
        return self._in_section(INTEGERS)

    @cached_property
    def flags(self) -> int:
        """Number of tensors with the rule `latest`: an update has a flag for each."""
        return sum(e.rule == LATEST for e in self.entries)

    @cached_property
    def tail_nbytes(self) -> int:
        """Size of what follows the float32 section of a frame, in bytes."""
        return 8 * (self.doubles + self.counters) + align(self.flags)

    @cached_property
    def nbytes(self) -> int:
        """Size of a frame's buffer, in bytes."""
        return align(4 * self.floats) + self.tail_nbytes

    @cached_property
    def frozen_nbytes(self) -> int:
        """Size of the frozen tensors, in bytes; they are in no frame's buffer."""
        return sum(_frozen_size(e) for e in self.entries if e.role == FROZEN)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the packed manifest, in hex."""
        return hashlib.sha256(self.pack()).hexdigest()

    @cached_property
    def frozen_by_name(self) -> dict[str, bool]:
        """Every name of a tensor in the module → whether the tensor is frozen."""
        return {name: e.role == FROZEN for e in self.entries for name in e.names}

    @cached_property
    def ruled_sections(self) -> tuple[str, ...]:
        """The sections with a tensor that takes more than an aggregation's own mean, or for integers maximum."""
        merged = (section for section in SECTIONS if self._in_section(section))
        return tuple(section for section in merged if section != INTEGERS or self._latest[section])

    def span(self, section: str, *rules: str) -> slice:
        """The elements of a section whose tensors have one of the rules, which must be neighbours in RULES."""
        return self._spans[section, rules]

    def latest(self, section: str) -> LatestTensors | None:
        """The tensors of a section with the rule `latest`; None without any."""
        return self._latest[section]

    def parameter_at(self, index: int) -> TensorSpec:
        """The parameter that has the element `index` of the parameters."""
        return next(e for e in self.entries if e.offset <= index < e.offset + e.length)

    def buffer_at(self, section: str, index: int) -> TensorSpec:
        """The buffer that has the element `index` of a section."""
        start = index + (self.parameters if section == FLOATS else 0)
        return next(e for e in self._buffers if e.section == section and e.offset <= start < e.offset + e.length)

    def _in_section(self, section: str) -> int:
        return sum(e.length for e in self._buffers if e.section == section)

    @cached_property
    def _buffers(self) -> list[TensorSpec]:
        return [e for e in self.entries if e.role in (BUFFER, COUNTER)]

    @cached_property
    def _spans(self) -> dict[tuple[str, tuple[str, ...]], slice]:
        spans = {}
        for section in SECTIONS:
            start, edges = 0, [0]
            for rule in RULES[BUFFER]:
                start += sum(e.length for e in self._buffers if (e.section, e.rule) == (section, rule))
                edges.append(start)
            for i in range(len(RULES[BUFFER])):
                for j in range(i, len(RULES[BUFFER])):
                    spans[section, RULES[BUFFER][i : j + 1]] = slice(edges[i], edges[j + 1])
        return spans

    @cached_property
    def _latest(self) -> dict[str, LatestTensors | None]:
        found: dict[str, LatestTensors | None] = {}
        flag = 0
        for section in SECTIONS:
            lengths = [e.length for e in self._buffers if (e.section, e.rule) == (section, LATEST)]
            flags = slice(flag, flag + len(lengths))
            flag += len(lengths)
            elements = self.span(section, LATEST)
            found[section] = LatestTensors(elements, flags, tuple(lengths)) if lengths else None
        return found

    @classmethod
    def from_module(cls, model: torch.nn.Module, aggregation: AggregationConfig | None = None) -> Manifest:
        """The manifest of a module whose buffers are merged as `aggregation` says, by default as without settings.

        Raises ManifestMismatch for a tensor that cannot be federated, and ConfigurationError for a pattern of
        `aggregation.buffers` that matches no buffer or a buffer that its rule cannot merge.
        """
        from fedqueue.tensors.module_tensors import module_tensors

        aggregation = aggregation or AggregationConfig()
        tensors = module_tensors(model)
        rules = _rules(tensors, aggregation)
        rows: list[tuple[ModuleTensor, str, str]] = []
        for tensor in tensors:
            dtype = tensor.tensor.dtype
            if str(dtype).removeprefix("torch.") not in DTYPES:
                raise ManifestMismatch(f"model: {tensor.name} is {dtype}; known: {', '.join(DTYPES)}")
            floating = dtype.is_floating_point
            if tensor.is_parameter:
                if tensor.is_trainable and not floating:
                    raise ManifestMismatch(f"model: parameter {tensor.name} is {dtype}; parameters must be floating")
                rows.append((tensor, PARAMETER if tensor.is_trainable else FROZEN, ""))
            elif rules[tensor.name] == FROZEN:
                rows.append((tensor, FROZEN, ""))
            else:
                rows.append((tensor, BUFFER if floating else COUNTER, rules[tensor.name]))
        if not any(role == PARAMETER for _, role, _ in rows):
            frozen = "frozen parameters only" if any(t.is_parameter for t in tensors) else "no parameters"
            raise ManifestMismatch(f"model: it has {frozen}, so there is nothing to train")
        return cls(_laid_out(rows))

    def require_maskable(self, statistics: str) -> None:
        """Raise ManifestMismatch where an update would have more than parameters: masks hide no buffer.

        With `aggregation.running_statistics` = "frozen", which is `statistics`, counters with the default rule are left
        at the values of version 0.
        """
        for e in self._buffers:
            if e.role == COUNTER and not e.rule and statistics == FROZEN:
                continue
            hint = "set aggregation.running_statistics = 'frozen', or use GroupNorm or LayerNorm, which have none"
            if e.rule:
                hint = f'write aggregation.buffers = {{ "{e.name}" = "frozen" }}'
            raise ManifestMismatch(f"model: masks hide no buffer, so {e.name} would tell about its client; {hint}")

    def pack(self) -> bytes:
        """The manifest as msgpack: for each tensor the fields of TensorSpec, in their order."""
        rows = [
            [e.name, e.dtype, list(e.shape), e.offset, e.length, e.role, e.rule, list(e.aliases), list(e.keys)]
            for e in self.entries
        ]
        return msgpack.packb(rows)  # type: ignore[no-any-return]

    @classmethod
    def unpack(cls, data: bytes) -> Manifest:
        """The inverse of `pack`; raises WireError unless every count, name, shape, offset and role is consistent."""
        try:
            rows = unpack(data, MAX_MANIFEST)
            if len(rows) > MAX_TENSORS:
                raise WireError(f"{len(rows)} tensors, at most {MAX_TENSORS} are allowed")
            entries = tuple(
                TensorSpec(n, d, tuple(s), o, k, r, u, tuple(a), tuple(w)) for n, d, s, o, k, r, u, a, w in rows
            )
        except (ValueError, TypeError, WireError) as error:
            raise WireError(f"manifest: not one of this protocol ({error})") from error
        expected = dict.fromkeys((PARAMETER, DOUBLES, INTEGERS, FROZEN), 0)
        seen: set[str] = set()
        saved: set[str] = set()
        for e in entries:
            if e.role not in ROLES or e.rule not in RULES[e.role]:
                raise WireError(f"manifest: bad role or rule: {e.role!r}, {e.rule!r}")
            _check_names(e, seen, saved)
            integers = (*e.shape, e.offset, e.length)
            if not isinstance(e.dtype, str) or e.dtype not in DTYPES:
                raise WireError(f"manifest: {e.name}: bad dtype {e.dtype!r}")
            if len(e.shape) > MAX_DIMENSIONS:
                raise WireError(f"manifest: {e.name}: {len(e.shape)} dimensions")
            if any(type(i) is not int or not 0 <= i < 2**48 for i in integers) or math.prod(e.shape) != e.length:
                raise WireError(f"manifest: {e.name}: bad shape {e.shape} or length {e.length}")
            if e.role != FROZEN and (e.dtype in FLOATING) == (e.role == COUNTER):
                raise WireError(f"manifest: {e.name}: a {e.role} cannot be {e.dtype}")
            section = _offset_of(e)
            if e.offset != expected[section]:
                raise WireError(f"manifest: {e.name}: offset {e.offset}, expected {expected[section]}")
            expected[section] += _frozen_size(e) if e.role == FROZEN else e.length
        order = [_order(e.role, e.dtype, e.rule) for e in entries]
        if not entries or order != sorted(order):
            raise WireError(f"manifest: roles must be {', '.join(ROLES)}, in that order, and rules in theirs")
        return cls(entries)

    def require(self, other: Manifest) -> None:
        """Raise ManifestMismatch naming the first tensor in which `other` differs from this one."""
        mine = {e.name: e for e in self.entries}
        theirs = {e.name: e for e in other.entries}
        for name in {**mine, **theirs}:
            if _describe(mine.get(name)) != _describe(theirs.get(name)):
                raise ManifestMismatch(
                    f"model: {name} is {_describe(theirs.get(name))} here and {_describe(mine.get(name))} "
                    "in the run; both sides must build the same model from the same task"
                )
        if self.entries != other.entries:
            raise ManifestMismatch(
                "model: the order of its tensors, or their names in state_dict(), differ from the run's"
            )


def align(nbytes: int) -> int:
    """The next multiple of 8."""
    return (nbytes + 7) // 8 * 8


def _rules(tensors: Sequence[ModuleTensor], aggregation: AggregationConfig) -> dict[str, str]:
    """Buffer → its rule, FROZEN included: of the first pattern that matches one of its names, else the default."""
    buffers = [tensor for tensor in tensors if not tensor.is_parameter]
    for pattern in aggregation.buffers:
        if not any(_matches(pattern, tensor) for tensor in buffers):
            parameters = any(_matches(pattern, tensor) for tensor in tensors)
            names = ", ".join(tensor.name for tensor in buffers[:10]) + (", …" if len(buffers) > 10 else "")
            raise ConfigurationError(
                "aggregation.buffers",
                pattern,
                "matches parameters only" if parameters else "matches no buffer of the model",
                "a parameter is frozen by requires_grad_(False) in model()" if parameters
                else f"its buffers: {names}" if names else "the model has no buffers",
            )  # fmt: skip
    rules = {}
    for tensor in buffers:
        pattern, rule = next(((p, r) for p, r in aggregation.buffers.items() if _matches(p, tensor)), ("", ""))
        floating = tensor.tensor.dtype.is_floating_point
        if rule == MEAN and not floating:
            raise ConfigurationError(
                "aggregation.buffers", pattern, f"{tensor.name} is {tensor.tensor.dtype}, which has no mean",
                "write 'latest', 'max' or 'frozen'",
            )  # fmt: skip
        rules[tensor.name] = (rule or _default_rule(tensor, aggregation)) if floating or rule != MAX else ""
    return rules


def _default_rule(tensor: ModuleTensor, aggregation: AggregationConfig) -> str:
    own = tensor.name.rpartition(".")[2]
    if not tensor.tensor.dtype.is_floating_point:
        return "" if any(fnmatch.fnmatchcase(own, pattern) for pattern in COUNTERS) else LATEST
    if own not in STATISTICS:
        return LATEST
    return FROZEN if aggregation.running_statistics == FROZEN else ""


def _matches(pattern: str, tensor: ModuleTensor) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for name in (*tensor.names, *tensor.keys))


def _laid_out(rows: Iterable[tuple[ModuleTensor, str, str]]) -> tuple[TensorSpec, ...]:
    """The entries in the order of a frame, each with its offset."""
    entries: list[TensorSpec] = []
    offsets = dict.fromkeys((PARAMETER, DOUBLES, INTEGERS, FROZEN), 0)
    named = [(str(t.tensor.dtype).removeprefix("torch."), t, role, rule) for t, role, rule in rows]
    for dtype, t, role, rule in sorted(named, key=lambda row: _order(row[2], row[0], row[3])):
        keys = () if t.keys == t.names else t.keys
        shape, length = tuple(t.tensor.shape), t.tensor.numel()
        entry = TensorSpec(t.name, dtype, shape, 0, length, role, rule, t.names[1:], keys)
        section = _offset_of(entry)
        entries.append(TensorSpec(t.name, dtype, shape, offsets[section], length, role, rule, t.names[1:], keys))
        offsets[section] += _frozen_size(entry) if role == FROZEN else length
    return tuple(entries)


def _order(role: str, dtype: str, rule: str) -> tuple[int, bool, int]:
    return ROLES.index(role), role == BUFFER and dtype == "float64", RULES[role].index(rule)


def _offset_of(entry: TensorSpec) -> str:
    """Which running offset an entry has: the float32 section begins with the parameters."""
    if entry.role in (PARAMETER, FROZEN):
        return entry.role
    return PARAMETER if entry.section == FLOATS else entry.section


def _frozen_size(entry: TensorSpec) -> int:
    return align(entry.length * DTYPES[entry.dtype])


def _check_names(entry: TensorSpec, seen: set[str], saved: set[str]) -> None:
    if len(entry.aliases) >= MAX_NAMES or len(entry.keys) > MAX_NAMES:
        raise WireError(f"manifest: {entry.name!r} has more than {MAX_NAMES} names")
    for name in (*entry.names, *entry.keys):
        if not isinstance(name, str) or len(name) > MAX_NAME:
            raise WireError(f"manifest: bad name {str(name)[:80]!r}")
    for names, known in ((entry.names, seen), (entry.saved_names, saved)):
        for name in names:
            if name in known:
                raise WireError(f"manifest: the name {name!r} comes twice")
            known.add(name)


def _describe(entry: TensorSpec | None) -> str:
    if entry is None:
        return "missing"
    rule = f" ({entry.rule})" if entry.rule else ""
    tied = f", tied to {', '.join(entry.aliases)}" if entry.aliases else ""
    return f"{entry.role} {entry.dtype} {list(entry.shape)}{rule}{tied}"
