"""Sums of float64 numbers without rounding, so that a merged sum does not depend on order or grouping."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import numpy.typing as npt

LARGEST = 1e140
"""The largest magnitude of a number whose square can be summed exactly."""
_SPLITTER = 2.0**27 + 1  # Dekker: halves of 26 bits, whose products are exact
_LOW_BITS = 27
_BLOCK = 2**24  # numbers whose halves of at most 27 bits add up to less than 2⁵³

Parts = tuple[float, ...]
"""A number as float64 parts whose exact sum it is, the largest first; () is 0."""


def exact_sum(values: npt.ArrayLike) -> Parts:
    """Return the exact sum of finite numbers, float64 (n,).

    Each part is the correctly rounded rest of the sum, as `math.fsum` gives it. One to three parts are usual.

    >>> exact_sum([1e16, 1.0, 1.0, -1e16])
    (2.0,)
    >>> exact_sum([1e16, 1.0])
    (1e+16, 1.0)
    """
    numbers = np.asarray(values, dtype=np.float64)
    rest = sum((_of_block(numbers[at : at + _BLOCK]) for at in range(0, len(numbers), _BLOCK)), Fraction(0))
    parts: list[float] = []
    while rest:
        parts.append(float(rest))
        rest -= Fraction(parts[-1])
    return tuple(parts)


def _of_block(numbers: npt.NDArray[np.float64]) -> Fraction:
    """The exact sum of at most _BLOCK numbers: the integers of 53 bits that they are, added for each exponent."""
    fractions, exponents = np.frexp(numbers)
    integers = np.ldexp(fractions, 53).astype(np.int64)
    least = int(exponents.min())
    high = np.bincount(exponents - least, weights=integers >> _LOW_BITS)
    low = np.bincount(exponents - least, weights=integers & (2**_LOW_BITS - 1))
    total = sum(
        ((int(of_high) << _LOW_BITS) + int(of_low)) << place
        for place, (of_high, of_low) in enumerate(zip(high, low, strict=True))
        if of_high or of_low
    )
    return Fraction(total) * Fraction(2) ** (least - 53)


def exact_sum_of_squares(values: npt.NDArray[np.float64]) -> Parts:
    """Return the exact sum of the squares of float64 (n,) numbers with magnitudes of at most LARGEST.

    T. J. Dekker, A floating-point technique for extending the available precision, 1971: each square is the sum of its
    rounded value and the rounding error, both of them float64. Below 1e-140 a square loses at most 5e-324.
    """
    square = values * values
    scaled = _SPLITTER * values
    high = scaled - (scaled - values)
    low = values - high
    error = ((high * high - square) + 2.0 * high * low) + low * low
    return exact_sum(np.concatenate([square, error]))


def as_fraction(parts: Parts) -> Fraction:
    """Return the number that the parts stand for."""
    return sum(map(Fraction, parts), Fraction(0))
