"""Inverse pairs between the parameters of a frame and fewer bytes, each with the greatest error of one element.

| name | bytes for n parameters | error of an element x |
|---|---|---|
| float16 | 2 n | ≤ 2⁻¹¹ |x|, or 2⁻²⁵ below 2⁻¹⁴; beyond 65,504 it becomes infinite, which no side accepts |
| bfloat16 | 2 n | ≤ 2⁻⁸ |x| |
| int8 | n + 4 ⌈n / block⌉ | ≤ s (1 + 2⁻¹⁶), s = max |x| of its block / 127; its mean is 0 |
| topk | 8 k | 0 for the k largest |x|, |x| for the others |
| randomk | 8 + 4 k | 0 for one element of each of k strata, |x| for the others |

Stochastic rounding: q = ⌊x / s + u⌋ with u uniform from [0, 1), so that E[s q] = x (Alistarh et al., arXiv 1610.02132,
§3.1, with a scale for each block). The two sparse ones send the values as they are: scaled by n / k, a random choice
would be unbiased, but what was left out comes back with the client's next delta (`feedback.py`), and then the scaling
would count it twice (Stich et al., arXiv 1809.07599, §2).

Decoding goes piece by piece, and merging decodes and adds in one pass (`fused.py`): neither needs a second model in
memory.
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
from fedqueue.errors import WireError
from fedqueue.tensors.frame import Piece, slices

Bytes = npt.NDArray[np.uint8]

PIECE = 524_288  # elements: as float32 they stay in the processor's cache
LEVELS = 127  # of int8, on each side of 0
TINY = float(np.finfo(np.float32).tiny)  # the least scale: dividing by less overflows
MOST_INDICES = 2**32  # parameters that an index of four bytes can tell apart


@dataclass(frozen=True)
class Encoding:
    """How n parameters, float32, become `size(n)` bytes, and those bytes pieces of float32 again."""

    name: str
    width: int
    """Bytes of one number: bytes of the same significance compress better side by side (`lossless.py`)."""
    size: Callable[[int], int]
    encode: Callable[[torch.Tensor, Bytes, int], None]
    """x, float32 [n] → bytes, uint8 [size(n)]; the third argument seeds whatever is random."""
    pieces: Callable[[Bytes, int], Iterator[Piece]]
    """Bytes and n → (where, values), values float32: `where` is a slice, or int64 positions that rise.

    Parameters in no piece are 0. The values of a piece are overwritten by the next. Raises WireError for bytes that
    nothing encodes to; values that are not finite are for the receiver to find.
    """
    add: Callable[[Bytes, torch.Tensor, float, bool], None]
    """Bytes, the sum `into`, float32 [n], weight, first → into += weight · x, or into = weight · x.

    What `pieces` says, but in one pass. Raises as it does, with what came before that added.
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
    block = config.block
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


# Few parameters, exactly


def _count(k: float, n: int) -> int:
    return min(n, math.ceil(k * n))


def topk(config: CompressionConfig) -> Encoding:
    """The k n parameters of largest magnitude: steps from one position to the next, uint32, then the values, float32.

    Among equals the first are taken. A step is small wherever k is not, so it compresses well.
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

    return Encoding("topk", 4, lambda n: 8 * _count(config.k, n), encode, pieces, add, sparse=True)


def randomk(config: CompressionConfig) -> Encoding:
    """One of each of k n equal strata, chosen by a seed: the seed, uint64, then the values, float32.

    Element i is drawn with ⌊n i / k⌋ + r_i mod (length of the stratum), r_i the raw words of numpy's Philox: those are
    the same on every machine and in every version, which numpy does not promise of what its Generator makes of them.
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

    return Encoding("randomk", 4, lambda n: 8 + 4 * _count(config.k, n), encode, pieces, add, sparse=True)


def largest(x: npt.NDArray[np.float32], count: int) -> npt.NDArray[np.int64]:
    """The rising positions of the `count` ≥ 1 elements of x, all finite, of largest magnitude; first among equals."""
    magnitudes = np.abs(x)
    threshold = np.partition(magnitudes, len(x) - count)[len(x) - count]
    above = np.flatnonzero(magnitudes > threshold)
    equal = np.flatnonzero(magnitudes == threshold)[: count - len(above)]
    return np.sort(np.concatenate([above, equal]))


def _drawn(seed: int, count: int, n: int) -> Iterator[tuple[slice, npt.NDArray[np.int64]]]:
    """Positions of elements `part` of `count`, rising, one in each of as many strata of 0 … n − 1."""
    generator = np.random.Philox(key=seed)
    for part in slices(count, PIECE):
        edges = np.arange(part.start, part.stop + 1, dtype=np.int64) * n // count
        lengths = np.diff(edges).astype(np.uint64)
        drawn = np.asarray(generator.random_raw(len(lengths)), np.uint64) % lengths
        yield part, edges[:-1] + drawn.astype(np.int64)


def _fused(name: str) -> Callable[..., Any]:
    from fedqueue.tensors.kernels import kernel  # numba: for those who merge, and late

    return kernel(name)


def _all_finite(x: torch.Tensor) -> bool:
    """A delta that is not finite is to be refused, even where what makes it so is not among what is sent."""
    return math.isfinite(float(torch.linalg.vector_norm(x)))


ENCODINGS: dict[str, Callable[[CompressionConfig], Encoding]] = {
    "float16": float16,
    "bfloat16": bfloat16,
    "int8": int8,
    "topk": topk,
    "randomk": randomk,
}
"""Without float32, which is the frame itself."""
