"""Gaussian noise as integers, which follows from a secret and from what it is added to.

The noise of one sum is ⌊σ g + ½⌋ with standard normal g: added to integers, it is the sum with real noise, rounded.
Rounding needs no further argument for privacy, and integers of σ ≥ 2¹⁰ have none of the gaps between floating-point
numbers that would tell the sum apart (Mironov, CCS 2012).

Its key is derived from the secret and the name of the sum, such as the digest of a cohort. The same cohort gets the
same bits again, and another cohort gets independent noise.

The normal deviates are those of the ziggurat (Marsaglia and Tsang, Journal of Statistical Software 5(8), 2000): the
area below exp(−x²/2) is covered by layers of equal area. A random point of a random layer is most often below the
curve for certain, which takes one word and two table look-ups. It is exact also for the points that need a closer look.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from fedqueue.privacy.secret_random import SecretRandom

Integers = npt.NDArray[np.int64]
Deviates = npt.NDArray[np.float64]

PIECE = 65_536
"""Deviates that are made at a time."""
FARTHEST = 9.42
"""No deviate is farther from 0. The tails that are missing have a probability below 5 · 10⁻²¹."""

_LAYERS = 256
_TAIL_BEGINS = 3.6541528853610088  # where the lowest layer's rectangle ends, for 256 layers
_BLOCK = 8_192  # deviates whose scratch memory fits into a core's cache


def _density(x: float) -> float:
    """The curve, without its constant factor."""
    return math.exp(-x * x / 2)


def _edges() -> list[float]:
    """x_0 > … > x_256 = 0: layer i has the width x_i, and lies below the curve up to x_{i+1}."""
    tail = math.sqrt(math.pi / 2) * math.erfc(_TAIL_BEGINS / math.sqrt(2))
    area = _TAIL_BEGINS * _density(_TAIL_BEGINS) + tail
    edges = [area / _density(_TAIL_BEGINS), _TAIL_BEGINS]
    while len(edges) < _LAYERS:
        edges.append(math.sqrt(-2 * math.log(area / edges[-1] + _density(edges[-1]))))
    return [*edges, 0.0]


_EDGES = np.array(_edges())
_CERTAIN = _EDGES[1:]
_SCALES = _EDGES[:-1] * 2.0**-52
_HEIGHTS = np.exp(-_EDGES * _EDGES / 2)


class _Normals:
    """A stream of standard normal deviates."""

    def __init__(self, secret: bytes, purpose: str) -> None:
        self._random = SecretRandom(secret, purpose)
        self._closer = SecretRandom(secret, f"{purpose}, a closer look")
        self._words = np.empty(_BLOCK, np.uint64)
        self._layers = np.empty(_BLOCK, np.intp)
        self._looked_up = np.empty(_BLOCK)

    def next_into(self, deviates: Deviates) -> None:
        """Fill a contiguous array with the next deviates."""
        for start in range(0, len(deviates), _BLOCK):
            self._fill(deviates[start : start + _BLOCK])

    def _fill(self, deviates: Deviates) -> None:
        count = len(deviates)
        words, layers, looked_up = self._words[:count], self._layers[:count], self._looked_up[:count]
        self._random.words_into(words)
        np.bitwise_and(words, np.uint64(_LAYERS - 1), out=layers, casting="unsafe")
        signed = words.view(np.int64)
        np.right_shift(signed, 11, out=signed)  # 53 bits, of which the layer has none
        np.add(signed, 0.5, out=deviates)  # symmetric around 0
        np.multiply(deviates, np.take(_SCALES, layers, out=looked_up, mode="wrap"), out=deviates)
        np.take(_CERTAIN, layers, out=looked_up, mode="wrap")
        uncertain = np.flatnonzero(np.abs(deviates) >= looked_up)
        if len(uncertain):
            deviates[uncertain] = self._look_closer(deviates[uncertain], layers[uncertain])

    def _look_closer(self, points: Deviates, layers: npt.NDArray[np.intp]) -> Deviates:
        """The deviates in place of points that may lie above the curve: the point, one of the tail, or a new draw."""
        found = points.copy()
        pending = np.arange(len(points))
        while len(pending):
            tail = layers[pending] == 0
            found[pending[tail]] = np.copysign(self._tail(int(tail.sum())), found[pending[tail]])
            pending = pending[~tail]
            below = self._is_below(found[pending], layers[pending])
            pending = pending[~below]
            words = self._closer.words(len(pending))
            layers[pending] = (words % _LAYERS).astype(np.intp)
            found[pending] = ((words.view(np.int64) >> 11) + 0.5) * _SCALES[layers[pending]]
            pending = pending[np.abs(found[pending]) >= _CERTAIN[layers[pending]]]
        return found

    def _is_below(self, points: Deviates, layers: npt.NDArray[np.intp]) -> npt.NDArray[np.bool_]:
        """Whether a point, at a random height in its layer, lies below the curve."""
        low, high = _HEIGHTS[layers], _HEIGHTS[layers + 1]
        below: npt.NDArray[np.bool_] = low + self._uniform(len(points)) * (high - low) < np.exp(-points * points / 2)
        return below

    def _tail(self, count: int) -> Deviates:
        """Absolute deviates beyond the lowest rectangle (Marsaglia, Technometrics 6(1), 1964)."""
        found = np.empty(count)
        pending = np.arange(count)
        while len(pending):
            beyond = -np.log(self._uniform(len(pending))) / _TAIL_BEGINS
            drawn = -2 * np.log(self._uniform(len(pending)))
            found[pending] = _TAIL_BEGINS + beyond
            pending = pending[(drawn <= beyond * beyond) | (found[pending] > FARTHEST)]
        return found

    def _uniform(self, count: int) -> Deviates:
        """Deviates that are uniform in (0, 1]."""
        return (self._closer.words(count).astype(np.float64) + 1.0) * 2.0**-64


def normal_pieces(secret: bytes, purpose: str, count: int) -> Iterator[Deviates]:
    """Return `count` standard normal deviates in consecutive float64 pieces of at most PIECE.

    A piece is valid until the next one, and may be changed. `secret` has 32 bytes.
    """
    normals, memory = _Normals(secret, purpose), np.empty(min(PIECE, count))
    for start in range(0, count, PIECE):
        piece = memory[: min(PIECE, count - start)]
        normals.next_into(piece)
        yield piece


def integer_noise(secret: bytes, purpose: str, deviation: float, count: int) -> Iterator[Integers]:
    """Return `count` integers of rounded Gaussian noise, in consecutive int64 pieces of at most PIECE.

    `deviation` is σ in units of the sum. A piece is valid until the next one, and may be changed.
    """
    memory = np.empty(min(PIECE, count), np.int64)
    for deviates in normal_pieces(secret, purpose, count):
        np.multiply(deviates, deviation, out=deviates)
        np.add(deviates, 0.5, out=deviates)
        np.floor(deviates, out=deviates)
        piece = memory[: len(deviates)]
        np.copyto(piece, deviates, casting="unsafe")
        yield piece
