"""What a site answers about its table: first sums, counts and ranges, then histograms on edges common to all sites.

Every number in an answer is about no row or about at least `min_count` rows, and so is what is left of a column when
its other numbers are subtracted:

- A column with fewer values than that is left out: all its values count as missing.
- A column with a few missing values counts `min_count` as missing: further values are set aside, and every statistic of
  the column is about the others. Which ones depends on the column's content and the minimum alone, so that repeating
  the question, in this run or in another, sets aside the same ones. The answer says that values were set aside, not
  how many.
- A category of fewer rows is counted among the others, with the next smallest until there are enough.
- A bin of fewer rows is counted together with its neighbours.
- A range ends at powers of two, around the `min_count`-th smallest and largest values: minimum and maximum would be
  rows.
"""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_left
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from fedqueue.statistics.exact_sum import exact_sum, exact_sum_of_squares
from fedqueue.statistics.table import MAX_COLUMNS, MAX_NAME, Categories, Column, Numbers

MAX_BINS = 1024
MAX_CATEGORIES = 128
MAX_PARTS = 64
StatisticName = Literal["count", "mean", "variance", "histogram", "categories"]
STATISTICS: tuple[StatisticName, ...] = ("count", "mean", "variance", "histogram", "categories")
"""What a site may answer; `count` includes the number of missing values, `histogram` the range and the quantiles."""

Natural = Annotated[int, Field(ge=0, lt=2**53)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
PartsField = Annotated[tuple[Finite, ...], Field(max_length=MAX_PARTS, strict=False)]


def _printable(name: str) -> str:
    if not name.isprintable():
        raise ValueError("a name has characters that cannot be printed")
    return name


Name = Annotated[str, Field(min_length=1, max_length=MAX_NAME), AfterValidator(_printable)]


class Answer(BaseModel):
    """The base of what a site answers: frozen, strict, bounded."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class NumbersAnswer(Answer):
    """Counts and exact sums of a column of numbers."""

    count: Natural
    missing: Natural
    set_aside: bool = False
    """Whether values were set aside, fewer than `min_count` of them, because too few were missing."""
    sum: PartsField | None = None
    """The exact sum as parts; None where the site's policy keeps it back."""
    squares: PartsField | None = None
    low: Finite | None = None
    """A power of two, below the `min_count`-th smallest value; None where the site's policy keeps it back."""
    high: Finite | None = None


class CategoriesAnswer(Answer):
    """Counts of the categories of a column."""

    count: Natural
    missing: Natural
    set_aside: bool = False
    counts: Annotated[dict[Name, Natural], Field(max_length=MAX_CATEGORIES)] = {}
    """Category → rows; sorted by name."""
    other: Natural = 0
    """Rows of all categories that are not in `counts`."""


class FirstAnswer(Answer):
    """A site's answer to the first question."""

    rows: Natural
    """0 where the table has fewer than `min_count` rows."""
    min_count: Annotated[int, Field(ge=1)]
    kept_back: Annotated[tuple[StatisticName, ...], Field(strict=False)] = ()
    """What the site's policy does not let out."""
    numbers: Annotated[dict[Name, NumbersAnswer], Field(max_length=MAX_COLUMNS)] = {}
    categories: Annotated[dict[Name, CategoriesAnswer], Field(max_length=MAX_COLUMNS)] = {}
    too_few: Annotated[tuple[Name, ...], Field(max_length=MAX_COLUMNS, strict=False)] = ()
    """Columns with fewer than `min_count` values, none of which is counted."""


class Bins(Answer):
    """The inner edges of a histogram: `bins` equal bins from `low` to `high`, and an open one at either end.

    A bin has its left edge and not its right one, except the last between the edges, which has both.
    """

    low: Finite
    high: Finite
    bins: Annotated[int, Field(ge=1, le=MAX_BINS)]
    public: bool = False
    """Whether the ends are public bounds: a value outside of them is counted as if it were at the bound."""

    @model_validator(mode="after")
    def _ordered(self) -> Bins:
        if not self.low < self.high:
            raise ValueError("low must be below high")
        return self

    @property
    def edges(self) -> npt.NDArray[np.float64]:
        """The inner edges, float64 (bins + 1,), not falling."""
        steps = np.arange(self.bins + 1) / self.bins
        edges: npt.NDArray[np.float64] = self.low * (1 - steps) + self.high * steps
        return edges

    def counts(self, values: npt.NDArray[np.float64]) -> list[int]:
        """Count float64 (n,) values in the bins + 2 bins."""
        edges = self.edges
        bins = np.searchsorted(edges, values, side="right")
        bins[values == edges[-1]] = self.bins
        counts: list[int] = np.bincount(bins, minlength=self.bins + 2).tolist()
        return counts


class HistogramAnswer(Answer):
    """A histogram whose bins are put together to groups of enough rows.

    Bin 0 is below edge 0, bin i is between edges i − 1 and i, the last one is above the last edge. Group j ends with
    bin `ends[j]` and has `counts[j]` rows.
    """

    ends: Annotated[tuple[Natural, ...], Field(max_length=MAX_BINS + 2, strict=False)]
    counts: Annotated[tuple[Natural, ...], Field(max_length=MAX_BINS + 2, strict=False)]

    @model_validator(mode="after")
    def _fits(self) -> HistogramAnswer:
        if len(self.ends) != len(self.counts) or list(self.ends) != sorted(set(self.ends)):
            raise ValueError("ends must rise, with one count for each")
        return self


class SecondAnswer(Answer):
    """A site's answer to the second question: column → histogram."""

    histograms: Annotated[dict[Name, HistogramAnswer], Field(max_length=MAX_COLUMNS)] = {}

    def fits(self, bins: Mapping[str, Bins]) -> bool:
        """Whether each histogram was asked for, and has all of its bins."""
        return all(
            name in bins and (not of.ends or of.ends[-1] == bins[name].bins + 1) for name, of in self.histograms.items()
        )


@dataclass(frozen=True)
class SiteTable:
    """A client's table with the site's rules; the statistics that leave the site are computed here."""

    columns: Mapping[str, Column]
    min_count: int
    allowed: Collection[StatisticName] = STATISTICS
    _kept: dict[str, tuple[npt.NDArray[np.bool_], bool]] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """The number of rows, which leaves the site only where it is at least `min_count`."""
        return len(next(iter(self.columns.values())).values)

    def first_answer(self) -> FirstAnswer:
        """Answer the first question."""
        kept_back = tuple(name for name in STATISTICS if name not in self.allowed)
        if self.rows < self.min_count:
            return FirstAnswer(rows=0, min_count=self.min_count, kept_back=kept_back, too_few=tuple(self.columns))
        numbers: dict[str, NumbersAnswer] = {}
        categories: dict[str, CategoriesAnswer] = {}
        too_few: list[str] = []
        for name, column in self.columns.items():
            used, _ = self._used(name)
            if not used.any():
                too_few.append(name)
            elif isinstance(column, Numbers):
                numbers[name] = self._of_numbers(name, column)
            else:
                categories[name] = self._of_categories(name, column)
        return FirstAnswer(
            rows=self.rows, min_count=self.min_count, kept_back=kept_back,
            numbers=numbers, categories=categories, too_few=tuple(too_few),
        )  # fmt: skip

    def second_answer(self, bins: Mapping[str, Bins]) -> SecondAnswer:
        """Answer the second question: a histogram of each column of numbers that `bins` names and the site has."""
        histograms = {}
        if "histogram" in self.allowed and self.rows >= self.min_count:
            for name, asked in bins.items():
                column = self.columns.get(name)
                if isinstance(column, Numbers) and self._used(name)[0].any():
                    values = column.values[self._used(name)[0]]
                    histograms[name] = grouped(asked.counts(values), self.min_count)
        return SecondAnswer(histograms=histograms)

    def _used(self, name: str) -> tuple[npt.NDArray[np.bool_], bool]:
        """Which rows of the column are described, bool (rows,), and whether values were set aside."""
        if name not in self._kept:
            column = self.columns[name]
            present = ~column.missing
            count, missing = int(present.sum()), int(column.missing.sum())
            set_aside = count >= self.min_count and 0 < missing < self.min_count
            if count < self.min_count or (set_aside and count - (self.min_count - missing) < self.min_count):
                present, set_aside = np.zeros_like(present), False
            elif set_aside:
                # Not the same ones for another minimum: the difference of two such sums would be a row.
                seed = f"{self.min_count} {name}\0".encode() + column.values.tobytes()
                digest = hashlib.sha256(seed).digest()
                chosen = np.random.default_rng(list(digest)).permutation(np.flatnonzero(present))
                present[chosen[: self.min_count - missing]] = False
            self._kept[name] = present, set_aside
        return self._kept[name]

    def _of_numbers(self, name: str, column: Numbers) -> NumbersAnswer:
        used, set_aside = self._used(name)
        values = column.values[used]
        low, high = octave_range(values, self.min_count) if "histogram" in self.allowed else (None, None)
        return NumbersAnswer(
            count=len(values),
            missing=self.rows - len(values),
            set_aside=set_aside,
            sum=exact_sum(values) if "mean" in self.allowed else None,
            squares=exact_sum_of_squares(values) if "variance" in self.allowed else None,
            low=low,
            high=high,
        )

    def _of_categories(self, name: str, column: Categories) -> CategoriesAnswer:
        used, set_aside = self._used(name)
        values = column.values[used]
        counts: dict[str, int] = {}
        other = 0
        if "categories" in self.allowed:
            of_index = np.bincount(values, minlength=len(column.names)).tolist()
            counts, other = large_enough(dict(zip(column.names, of_index, strict=True)), self.min_count)
        return CategoriesAnswer(
            count=len(values), missing=self.rows - len(values), set_aside=set_aside, counts=counts, other=other
        )


def large_enough(counts: Mapping[str, int], min_count: int) -> tuple[dict[str, int], int]:
    """Return the counts of the categories that may be named, sorted by name, and the number of all other rows.

    That number is 0 or at least `min_count`: the smallest categories join the others until it is.

    >>> large_enough({"a": 40, "b": 12, "c": 3, "d": 0}, 10)
    ({'a': 40}, 15)
    """
    ranked = sorted((item for item in counts.items() if item[1]), key=lambda item: (-item[1], item[0]))
    named, rest = ranked[:MAX_CATEGORIES], sum(count for _, count in ranked[MAX_CATEGORIES:])
    while named and (named[-1][1] < min_count or 0 < rest < min_count):
        rest += named.pop()[1]
    return dict(sorted(named)), rest


def grouped(counts: list[int], min_count: int) -> HistogramAnswer:
    """Return a histogram whose neighbouring bins are put together so that each group has at least `min_count` rows.

    An edge stays where both sides of it, up to the next edges that stay, have enough rows. Edges are tried in a fixed
    order, the coarse ones first (those whose number has the largest power of two as a factor), so that different sites
    keep edges in common. With `min_count` 1 all edges stay.

    >>> grouped([0, 2, 9, 0, 30, 1], 10)
    HistogramAnswer(ends=(3, 5), counts=(11, 31))
    """
    last = len(counts) - 1
    if min_count == 1:
        return HistogramAnswer(ends=tuple(range(last + 1)), counts=tuple(counts))
    below = [0, *accumulate(counts)]
    if below[-1] < min_count:
        return HistogramAnswer(ends=(), counts=())
    kept = [-1, last]
    for end in sorted(range(last), key=_coarseness, reverse=True):
        place = bisect_left(kept, end)
        left, right = kept[place - 1], kept[place]
        if min(below[end + 1] - below[left + 1], below[right + 1] - below[end + 1]) >= min_count:
            kept.insert(place, end)
    groups = [below[b + 1] - below[a + 1] for a, b in pairwise(kept)]
    return HistogramAnswer(ends=tuple(kept[1:]), counts=tuple(groups))


def _coarseness(end: int) -> int:
    """The largest power of two that divides the number of an edge; edge 0, beyond which a bin is open, comes last."""
    return end & -end


def octave_range(values: npt.NDArray[np.float64], min_count: int) -> tuple[float, float]:
    """Return the lower edge of the octave of the `min_count`-th smallest value, and the upper edge of that of the
    `min_count`-th largest one: at least `min_count` values lie on either side. There are at least as many values.

    The octaves of positive numbers are [2ⁿ, 2ⁿ⁺¹), those of negative ones their mirror images, and 0 is its own.

    >>> octave_range(np.array([3.0, 3.5, 5.0, 6.0, 900.0]), 2)
    (2.0, 8.0)
    """
    ends = [min_count - 1, len(values) - min_count]
    small, large = np.partition(values, ends)[ends].tolist()
    return min(_octave(small)[0], _octave(large)[0]), max(_octave(small)[1], _octave(large)[1])


def _octave(value: float) -> tuple[float, float]:
    if value == 0:
        return 0.0, 2.0**-1022
    exponent = math.frexp(value)[1]
    inner, outer = math.ldexp(0.5, exponent), math.ldexp(1.0, exponent)
    return (inner, outer) if value > 0 else (-outer, -inner)
