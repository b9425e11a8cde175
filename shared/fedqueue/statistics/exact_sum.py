"""Sums of float64 numbers without rounding, so that a merged sum does not depend on order or grouping."""

from __future__ import annotations

import math
from collections.abc import Iterable
from fractions import Fraction
from itertools import chain

import numpy as np
import numpy.typing as npt

LARGEST = 1e140
"""The largest magnitude of a number whose square can be summed exactly."""
_SPLITTER = 2.0**27 + 1  # Dekker: halves of 26 bits, whose products are exact

Parts = tuple[float, ...]
"""A number as float64 parts whose exact sum it is, the largest first; () is 0."""


def exact_sum(values: Iterable[float]) -> Parts:
    """Return the exact sum of finite numbers.

    Each part is the correctly rounded rest of the sum, as `math.fsum` gives it. Two or three parts are usual.

    >>> exact_sum([1e16, 1.0, 1.0, -1e16])
    (2.0,)
    >>> exact_sum([1e16, 1.0])
    (1e+16, 1.0)
    """
    numbers = list(values)
    parts: list[float] = []
    while rest := math.fsum(chain(numbers, (-part for part in parts))):
        parts.append(rest)
    return tuple(parts)


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
    return exact_sum(chain(square.tolist(), error.tolist()))


def as_fraction(parts: Parts) -> Fraction:
    """Return the number that the parts stand for."""
    return sum(map(Fraction, parts), Fraction(0))
