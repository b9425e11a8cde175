"""Lossy encodings of a frame's parameters, each with the largest error of one element.

| name | bytes for n parameters | error of an element x |
|---|---|---|
| float16 | 2 n | ≤ 2⁻¹¹ |x|, or 2⁻²⁵ below 2⁻¹⁴; beyond 65,504 it becomes infinite, which both sides refuse |
| bfloat16 | 2 n | ≤ 2⁻⁸ |x| |
| int8 | n + 4 ⌈n / block⌉ | ≤ s (1 + 2⁻¹⁶), s = max |x| of its block / 127; the mean error is 0 |
| topk | 8 k | 0 for the k largest |x|, |x| for the others |
| randomk | 8 + 4 k | 0 for one element of each of k strata, |x| for the others |

Stochastic rounding: q = ⌊x / s + u⌋ with u uniform from [0, 1), so that E[s q] = x (Alistarh et al., arXiv 1610.02132,
§3.1, with a scale for each block). The two sparse encodings send unscaled values. Scaling by n / k would make a random
choice unbiased, but error feedback (`error_feedback.py`) adds the omitted values to the client's next delta, so scaling
would count them twice (Stich et al., arXiv 1809.07599, §2).

Decoding proceeds piece by piece, and merging decodes and adds in one pass (`kernels.py`). Neither needs memory for a
second model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fedqueue.config.compression import CompressionConfig
from fedqueue.errors import MissingExtra, WireError
from fedqueue.tensors.blobs import slices
from fedqueue.tensors.frame import Piece

Bytes = npt.NDArray[np.uint8]

PIECE = 524_288  # elements: as float32 they fit into the processor's cache
LEVELS = 127  # of int8, on each side of 0
TINY = float(np.finfo(np.float32).tiny)  # the smallest scale: dividing by less would overflow
MOST_INDICES = 2**32  # the largest number of parameters that four-byte indices can address


@dataclass(frozen=True)
class Encoding:
    """How n float32 parameters become `size(n)` bytes, and how those bytes become float32 again."""

    name: str
    width: int
    """Bytes of one number; `zstd.py` groups bytes of equal significance, which compresses better."""
    size: Callable[[int], int]
    encode: Callable[[torch.Tensor, Bytes, int], None]
    """x, float32 [n] → bytes, uint8 [size(n)]; the third argument seeds random choices."""
    pieces: Callable[[Bytes, int], Iterator[Piece]]
    """Bytes and n → (where, values): `where` is a slice or rising int64 indices, `values` float32.

    A parameter in no piece is 0. The next piece may overwrite the values of this one. Raises WireError for bytes that
    no encoder produces; it does not check whether the values are finite.
    """
    add: Callable[[Bytes, torch.Tensor, float, bool], None]
    """Bytes, the sum `into` (float32 [n]), weight, first → into += weight · x, or with `first` into = weight · x.

    Equivalent to `pieces` with an addition, but in one pass. Raises as `pieces`, after having added a part.
    """
    sparse: bool = False


# Narrower floats


def _narrow(name: str, dtype: torch.dtype) -> Encoding:
    def encode(x: torch.Tensor, data: Bytes, seed: int) -> None:
        torch.from_numpy(data).view(dtype).copy_(x)

    def add(data: Bytes, into: torch.Tensor, weight: float, first: bool) -> None:
        _fused(name)(into.numpy(), data.view(np.uint16), weight, first)

    def pieces(data: Bytes, n: int) -> Iterator[Piece]:
        narrow, scratch = torch.from_numpy(data).view(dtype), torch.empty(min(n, PIECE))
        for part in slices(n, PIECE):
            yield part, scratch[: part.stop - part.start].copy_(narrow[part])

    return Encoding(name, 2, lambda n: 2 * n, encode, pieces, add)


def float16(config: CompressionConfig) -> Encoding:
    """IEEE half precision: 11 significant bits, down to 2⁻²⁴."""
    return _narrow("float16", torch.float16)


def bfloat16(config: CompressionConfig) -> Encoding:
    """The upper half of a float32: 8 significant bits, and its whole range."""
    return _narrow("bfloat16", torch.bfloat16)


# Eight bits with a scale for each block: the scales, float32, then the levels, int8


def int8(config: CompressionConfig) -> Encoding:
    """Integers from −127 to 127, rounded stochastically, and a float32 scale for each `int8_block` elements."""
    block = config.int8_block
    piece = max(1, PIECE // block) * block

    def split(data: Bytes, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        edge = 4 * -(-n // block)
        return torch.from_numpy(data[:edge].view(np.float32)), torch.from_numpy(data[edge:].view(np.int8))

    def checked(data: Bytes, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        scales, levels = split(data, n)
        if len(scales) and float(scales.min()) < 0:
            raise WireError("int8: a scale is negative")
        return scales, levels

    def encode(x: torch.Tensor, data: Bytes, seed: int) -> None:
        scales, levels = split(data, len(x))
        generator = np.random.Generator(np.random.SFC64(seed))
        scratch, noise = torch.zeros(min(piece, len(scales) * block)), np.empty(piece, np.float32)
        for part in slices(len(x), piece):
            length = part.stop - part.start
            scratch[:length].copy_(x[part])
            rows = scratch[: -(-length // block) * block].view(-1, block)
            rows.view(-1)[length:].zero_()
            scale = scales[part.start // block :][: len(rows)]
            scale.copy_(torch.linalg.vector_norm(rows, torch.inf, dim=1)).div_(LEVELS).clamp_(min=TINY)
            generator.random(out=noise[: rows.numel()], dtype=np.float32)
            rows.div_(scale.unsqueeze(1)).add_(torch.from_numpy(noise[: rows.numel()]).view(-1, block))
            levels[part].copy_(rows.floor_().clamp_(-LEVELS, LEVELS).view(-1)[:length])

    def pieces(data: Bytes, n: int) -> Iterator[Piece]:
        scales, levels = checked(data, n)
        scratch = torch.zeros(min(piece, len(scales) * block))
        for part in slices(n, piece):
            values = scratch[: part.stop - part.start].copy_(levels[part])
            rows = scratch[: -(-len(values) // block) * block].view(-1, block)
            rows.mul_(scales[part.start // block :][: len(rows)].unsqueeze(1))
            yield part, values

    def add(data: Bytes, into: torch.Tensor, weight: float, first: bool) -> None:
        scales, levels = checked(data, len(into))
        _fused("int8")(into.numpy(), levels.numpy(), scales.numpy(), block, weight, first)

    return Encoding("int8", 1, lambda n: n + 4 * -(-n // block), encode, pieces, add)


# A few parameters, exactly


def _count(k: float, n: int) -> int:
    return min(n, math.ceil(k * n))


def topk(config: CompressionConfig) -> Encoding:
    """The k n parameters of largest magnitude: steps from one index to the next, uint32, then the values, float32.

    Of equal magnitudes the first are taken. Steps are small unless k is small, so they compress well.
    """

    def split(data: Bytes) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.float32]]:
        return data[: len(data) // 2].view(np.uint32), data[len(data) // 2 :].view(np.float32)

    def encode(x: torch.Tensor, data: Bytes, seed: int) -> None:
        steps, values = split(data)
        if not _all_finite(x):
            steps[:], values[:] = 1, np.nan
            return
        positions = largest(x.numpy(), len(values))
        steps[:] = np.diff(positions, prepend=-1)
        np.take(x.numpy(), positions, out=values)

    def pieces(data: Bytes, n: int) -> Iterator[Piece]:
        steps, values = split(data)
        position = -1
        for part in slices(len(values), PIECE):
            if not int(steps[part].min()):
                raise WireError("topk: a position comes twice")
            positions = np.cumsum(steps[part], dtype=np.int64)
            positions += position
            position = int(positions[-1])
            if position >= n:
                raise WireError(f"topk: position {position} of {n} parameters")
            yield torch.from_numpy(positions), torch.from_numpy(values[part])

    def add(data: Bytes, into: torch.Tensor, weight: float, first: bool) -> None:
        if first:
            into.zero_()
        if not _fused("topk")(into.numpy(), *split(data), weight):
            raise WireError(f"topk: a position comes twice, or is not one of {len(into)} parameters")

    return Encoding("topk", 4, lambda n: 8 * _count(config.topk_ratio, n), encode, pieces, add, sparse=True)


def randomk(config: CompressionConfig) -> Encoding:
    """One parameter of each of k n equal strata, chosen by a seed: the seed, uint64, then the values, float32.

    Element i has index ⌊n i / k⌋ + r_i mod (length of the stratum), with r_i the raw words of numpy's Philox. These are
    the same on every machine and in every version of numpy; the derived numbers of its Generator may change.
    """

    def encode(x: torch.Tensor, data: Bytes, seed: int) -> None:
        values = data[8:].view(np.float32)
        data[:8].view(np.uint64)[0] = seed
        if not _all_finite(x):
            values[:] = np.nan
            return
        for part, positions in _drawn(seed, len(values), len(x)):
            np.take(x.numpy(), positions, out=values[part])

    def pieces(data: Bytes, n: int) -> Iterator[Piece]:
        values = data[8:].view(np.float32)
        for part, positions in _drawn(int(data[:8].view(np.uint64)[0]), len(values), n):
            yield torch.from_numpy(positions), torch.from_numpy(values[part])

    def add(data: Bytes, into: torch.Tensor, weight: float, first: bool) -> None:
        if first:
            into.zero_()
        for positions, values in pieces(data, len(into)):
            assert isinstance(positions, torch.Tensor)
            into.index_add_(0, positions, values, alpha=weight)

    return Encoding("randomk", 4, lambda n: 8 + 4 * _count(config.topk_ratio, n), encode, pieces, add, sparse=True)


def largest(x: npt.NDArray[np.float32], count: int) -> npt.NDArray[np.int64]:
    """The rising indices of the `count` ≥ 1 elements of x (finite) of largest magnitude; first among equals."""
    magnitudes = np.abs(x)
    threshold = np.partition(magnitudes, len(x) - count)[len(x) - count]
    above = np.flatnonzero(magnitudes > threshold)
    equal = np.flatnonzero(magnitudes == threshold)[: count - len(above)]
    return np.sort(np.concatenate([above, equal]))


def _drawn(seed: int, count: int, n: int) -> Iterator[tuple[slice, npt.NDArray[np.int64]]]:
    """Slices of 0 … count − 1, each with rising indices: one index in each of `count` strata of 0 … n − 1."""
    generator = np.random.Philox(key=seed)
    for part in slices(count, PIECE):
        edges = np.arange(part.start, part.stop + 1, dtype=np.int64) * n // count
        lengths = np.diff(edges).astype(np.uint64)
        drawn = np.asarray(generator.random_raw(len(lengths)), np.uint64) % lengths
        yield part, edges[:-1] + drawn.astype(np.int64)


def _fused(name: str) -> Callable[..., Any]:
    try:
        from fedqueue.tensors.kernels import kernel  # late, and by the coordinator only: it imports numba
    except ModuleNotFoundError as error:
        if error.name != "numba":
            raise
        raise MissingExtra("merging encoded updates", "numba", "compression") from None
    return kernel(name)


def _all_finite(x: torch.Tensor) -> bool:
    """Whether all values are finite. Otherwise the update has to be refused, even if no such value would be sent."""
    return math.isfinite(float(torch.linalg.vector_norm(x)))


ENCODINGS: dict[str, Callable[[CompressionConfig], Encoding]] = {
    "float16": float16,
    "bfloat16": bfloat16,
    "int8": int8,
    "topk": topk,
    "randomk": randomk,
}
"""Makers of the encodings by name; float32 is absent, because it is the frame itself."""
