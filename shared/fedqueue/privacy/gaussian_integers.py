"""Gaussian noise as integers, which follows from a secret and from what it is added to.

The noise of one sum is ⌊σ g + ½⌋ with standard normal g: added to integers, it is the sum with real noise, rounded.
Rounding needs no further argument for privacy, and integers of σ ≥ 2¹⁰ have none of the gaps between floating-point
numbers that would tell the sum apart (Mironov, CCS 2012).

Its key is derived from the secret and the name of the sum, such as the digest of a cohort. The same cohort gets the
same bits again, and another cohort gets independent noise.
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
"""Deviates that are made at a time; the bits depend on it."""
FARTHEST = 9.42
"""No deviate is farther from 0: √(128 log 2). The tails that are missing have a probability below 5 · 10⁻²¹."""


def normal_pieces(secret: bytes, purpose: str, count: int) -> Iterator[Deviates]:
    """Return `count` standard normal deviates in consecutive float64 pieces, each a new array of at most PIECE.

    Box and Muller, 1958: two 64-bit words make two deviates. `secret` has 32 bytes.
    """
    random = SecretRandom(secret, purpose)
    for start in range(0, count, PIECE):
        wanted = min(PIECE, count - start)
        half = -(-wanted // 2)
        uniform = random.words(2 * half).astype(np.float64)
        uniform += 1.0
        uniform *= 2.0**-64  # in (0, 1]
        radius, angle = uniform[:half], uniform[half:]
        np.log(radius, out=radius)
        radius *= -2.0
        np.sqrt(radius, out=radius)
        angle *= 2 * math.pi
        deviates = np.empty(2 * half)
        np.cos(angle, out=deviates[:half])
        np.sin(angle, out=deviates[half:])
        deviates[:half] *= radius
        deviates[half:] *= radius
        yield deviates[:wanted]


def rounded(values: Deviates) -> Integers:
    """Return ⌊x + ½⌋ of each value, int64, in new memory; `values` is changed."""
    values += 0.5
    return np.floor(values, out=values).astype(np.int64)


def integer_noise(secret: bytes, purpose: str, deviation: float, count: int) -> Iterator[Integers]:
    """Return `count` integers of rounded Gaussian noise, in consecutive int64 pieces of at most PIECE.

    `deviation` is σ in units of the sum.
    """
    for deviates in normal_pieces(secret, purpose, count):
        yield rounded(deviation * deviates)
