"""Merges the sites' answers: the statistics of all their rows, as if they were one table."""

from __future__ import annotations

import difflib
import math
from bisect import bisect_right
from collections.abc import Callable, Mapping
from fractions import Fraction
from itertools import accumulate, pairwise
from typing import Annotated, Literal, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedqueue.config.statistics import StatisticsConfig
from fedqueue.errors import ConfigurationError, TaskError
from fedqueue.statistics.exact_sum import as_fraction
from fedqueue.statistics.site_answers import (
    Bins,
    CategoriesAnswer,
    FirstAnswer,
    HistogramAnswer,
    NumbersAnswer,
    SecondAnswer,
    StatisticName,
)

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
SHOWN_BINS = 32  # of a histogram in the result, at most

T = TypeVar("T", NumbersAnswer, CategoriesAnswer)


class _Result(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Quantile(_Result):
    """A quantile, and the bound of its error: the pooled rows' quantile is between `low` and `high`."""

    value: float | None
    """None where the rows are in an open bin on both sides."""
    low: float | None
    """None for no lower bound."""
    high: float | None


class NumberSummary(_Result):
    """Counts and moments of a column of numbers."""

    count: int
    """Values that are described."""
    missing: int
    """Missing values, with those that sites set aside, and all rows of sites with too few values of the column."""
    mean: float | None
    """Correctly rounded from the exact sum; None where no site gives it."""
    variance: float | None
    """With n − 1 in the denominator, correctly rounded; None for fewer than two values."""

    @property
    def deviation(self) -> float | None:
        """The standard deviation, the root of `variance`."""
        return None if self.variance is None else math.sqrt(self.variance)


class NumberStatistics(NumberSummary):
    """Statistics of a column of numbers over all sites."""

    kind: Literal["numbers"] = "numbers"
    set_aside_at: tuple[str, ...] = ()
    """Sites that set a few values aside, fewer than their minimum, so that the number of missing ones is no secret."""
    quantiles: dict[str, Quantile] = {}
    """"0.05", "0.25", "0.5", "0.75" and "0.95" → quantile; empty where no site gives a histogram."""
    edges: tuple[float | None, ...] = ()
    """The edges of the histogram; None at an open end."""
    counts: tuple[int, ...] = ()
    """The rows in each bin of the histogram, exact."""
    sites: dict[str, NumberSummary] = {}


class CategorySummary(_Result):
    """Counts of the categories of a column."""

    count: int
    missing: int
    counts: dict[str, int]
    """Category → rows at the sites that could name it."""
    other: int
    """Rows of categories that a site had too few rows of."""

    @property
    def shares(self) -> dict[str, float]:
        """Category → its rows as a part of all values that are described."""
        total = sum(self.counts.values()) + self.other
        return {name: count / total for name, count in self.counts.items()}


class CategoryStatistics(CategorySummary):
    """Statistics of a column of categories over all sites."""

    kind: Literal["categories"] = "categories"
    set_aside_at: tuple[str, ...] = ()
    sites: dict[str, CategorySummary] = {}


ColumnStatistics = Annotated[NumberStatistics | CategoryStatistics, Field(discriminator="kind")]


class Statistics(_Result):
    """What `fedqueue describe` finds, and what `Task.prepare` receives.

    `statistics.numbers("age").mean` and `statistics.categories("ill").shares` are the usual ways to read it.
    """

    run: str
    rows: int
    """Rows of the sites that answered."""
    columns: dict[str, ColumnStatistics]
    sites: dict[str, int]
    """Site → its rows; 0 where it has fewer than its minimum."""
    min_count: dict[str, int]
    """Site → the smallest number of rows that one of its figures is about."""
    kept_back: dict[str, tuple[StatisticName, ...]] = {}
    """Site → statistics that its policy keeps back."""
    too_few: dict[str, tuple[str, ...]] = {}
    """Site → columns of which it has too few values to describe them."""
    refused: dict[str, str] = {}
    """Site → why it answered nothing."""

    def numbers(self, column: str) -> NumberStatistics:
        """Return the statistics of a column of numbers; raises TaskError where no site described it as one."""
        found = self.columns.get(column)
        if not isinstance(found, NumberStatistics):
            raise TaskError(self._lacks(column, "numbers", NumberStatistics))
        return found

    def categories(self, column: str) -> CategoryStatistics:
        """Return the statistics of a column of categories; raises TaskError as `numbers`."""
        found = self.columns.get(column)
        if not isinstance(found, CategoryStatistics):
            raise TaskError(self._lacks(column, "categories", CategoryStatistics))
        return found

    def hides_missing(self, column: str) -> bool:
        """Whether a site has fewer missing values in the column than `missing` counts, so that it is an upper bound."""
        return bool(self.columns[column].set_aside_at) or any(
            column in names and self.sites[site] for site, names in self.too_few.items()
        )

    def _lacks(self, column: str, kind: str, wanted: type) -> str:
        known = ", ".join(name for name, of in self.columns.items() if isinstance(of, wanted)) or "none"
        return f"the statistics describe no column {column!r} of {kind}; columns of {kind}: {known}"


def read_statistics(config: StatisticsConfig) -> Statistics:
    """Return the statistics that the configuration carries; raises ConfigurationError for values of another form."""
    try:
        return Statistics.model_validate(config.values)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, problem["loc"]))
        raise ConfigurationError(
            "statistics.file", config.file, f"has no valid statistics: {where}: {problem['msg']}",
            "write it again with `fedqueue describe`",
        ) from None  # fmt: skip


def common_bins(
    answers: Mapping[str, FirstAnswer], bins: int, bounds: Mapping[str, tuple[float, float]]
) -> dict[str, Bins]:
    """Return the edges that all sites are asked about: column → `bins` bins over its public bounds, or over the sites'
    ranges. A column without either is left out.

    Raises ConfigurationError for bounds of a column that no site describes as numbers.
    """
    ranges: dict[str, tuple[float, float]] = {}
    for answer in answers.values():
        for name, of in answer.numbers.items():
            if of.low is not None and of.high is not None:
                low, high = ranges.get(name, (of.low, of.high))
                ranges[name] = min(low, of.low), max(high, of.high)
    described = {name for answer in answers.values() for name in answer.numbers}
    for name in bounds.keys() - described:
        near = difflib.get_close_matches(name, described, n=1)
        known = (
            f"did you mean {near[0]!r}?" if near else f"columns of numbers: {', '.join(sorted(described)) or 'none'}"
        )
        raise ConfigurationError("statistics.bounds", None, f"names {name!r}, which no site describes", known)
    ranges.update({name: ends for name, ends in bounds.items() if name in described})
    return {
        name: Bins(low=low, high=high, bins=bins, public=name in bounds) for name, (low, high) in sorted(ranges.items())
    }


def merge(
    run: str,
    first: Mapping[str, FirstAnswer],
    second: Mapping[str, SecondAnswer],
    bins: Mapping[str, Bins],
    refused: Mapping[str, str],
) -> Statistics:
    """Return the statistics of all rows from the answers of the sites, client → answer.

    The order of the sites does not matter. Raises TaskError for a column that is numbers at one site and
    categories at another.
    """
    columns: dict[str, ColumnStatistics] = {}
    names = dict.fromkeys(
        name for client in sorted(first) for name in (*first[client].numbers, *first[client].categories)
    )
    for name in names:
        numbers = {client: first[client].numbers[name] for client in sorted(first) if name in first[client].numbers}
        texts = {client: first[client].categories[name] for client in sorted(first) if name in first[client].categories}
        if numbers and texts:
            raise TaskError(
                f"column {name!r} has numbers at {next(iter(numbers))} and categories at {next(iter(texts))}; "
                "Task.table must return the same kind at each site"
            )
        elsewhere = sum(answer.rows for answer in first.values() if name in answer.too_few)
        if texts:
            columns[name] = _merge_categories(texts, elsewhere)
        else:
            histograms = {
                client: second[client].histograms[name]
                for client in sorted(second)
                if client in numbers and name in second[client].histograms
            }
            columns[name] = _merge_numbers(numbers, histograms, bins.get(name), elsewhere)
    return Statistics(
        run=run,
        rows=sum(answer.rows for answer in first.values()),
        columns=columns,
        sites={client: first[client].rows for client in sorted(first)},
        min_count={client: first[client].min_count for client in sorted(first)},
        kept_back={client: first[client].kept_back for client in sorted(first) if first[client].kept_back},
        too_few={client: first[client].too_few for client in sorted(first) if first[client].too_few},
        refused=dict(refused),
    )


def _summary(answers: Mapping[str, NumbersAnswer]) -> NumberSummary:
    summed = [of for of in answers.values() if of.sum is not None]
    squared = [of for of in summed if of.squares is not None]
    mean = variance = None
    if count := sum(of.count for of in summed):
        mean = float(_total(summed, lambda of: of.sum) / count)
    if (count := sum(of.count for of in squared)) > 1:
        total, squares = _total(squared, lambda of: of.sum), _total(squared, lambda of: of.squares)
        variance = float((squares - total * total / count) / (count - 1))
    return NumberSummary(
        count=sum(of.count for of in answers.values()),
        missing=sum(of.missing for of in answers.values()),
        mean=mean,
        variance=variance,
    )


def _total(answers: list[NumbersAnswer], part: Callable[[NumbersAnswer], tuple[float, ...] | None]) -> Fraction:
    return sum((as_fraction(part(of) or ()) for of in answers), Fraction(0))


def _merge_numbers(
    answers: Mapping[str, NumbersAnswer], histograms: Mapping[str, HistogramAnswer], bins: Bins | None, elsewhere: int
) -> NumberStatistics:
    quantiles: dict[str, Quantile] = {}
    edges: tuple[float | None, ...] = ()
    counts: tuple[int, ...] = ()
    if bins is not None and (given := [histogram for histogram in histograms.values() if histogram.ends]):
        quantiles = {str(q): quantile(given, bins, q) for q in QUANTILES}
        edges, counts = _shown(given, bins)
    return NumberStatistics(
        **{**(summary := _summary(answers)).model_dump(), "missing": summary.missing + elsewhere},
        set_aside_at=tuple(client for client, of in answers.items() if of.set_aside),
        quantiles=quantiles,
        edges=edges,
        counts=counts,
        sites={client: _summary({client: of}) for client, of in answers.items()},
    )


def _merge_categories(answers: Mapping[str, CategoriesAnswer], elsewhere: int) -> CategoryStatistics:
    counts: dict[str, int] = {}
    for of in answers.values():
        for name, count in of.counts.items():
            counts[name] = counts.get(name, 0) + count
    return CategoryStatistics(
        count=sum(of.count for of in answers.values()),
        missing=sum(of.missing for of in answers.values()) + elsewhere,
        counts=dict(sorted(counts.items())),
        other=sum(of.other for of in answers.values()),
        set_aside_at=tuple(client for client, of in answers.items() if of.set_aside),
        sites={
            client: CategorySummary(count=of.count, missing=of.missing, counts=of.counts, other=of.other)
            for client, of in answers.items()
        },
    )


def quantile(histograms: list[HistogramAnswer], bins: Bins, q: float) -> Quantile:
    """Return the quantile `q` of the rows of all histograms, which have these bins, and the interval that it is in.

    The interval holds for each definition of the quantile that lies between the two rows around rank q (n − 1), such as
    numpy's "linear". Between its ends, `value` is interpolated.
    """
    edges = bins.edges
    below = np.zeros((2, len(edges)))  # at each edge: the least and the most rows that may be below it
    for histogram in histograms:
        sums = [0, *accumulate(histogram.counts)]
        for i in range(len(edges)):
            group = bisect_right(histogram.ends, i)  # whole groups up to bin i
            exact = group > 0 and histogram.ends[group - 1] == i
            below[:, i] += sums[group], sums[group if exact else group + 1]
    total = sum(sum(histogram.counts) for histogram in histograms)
    rank = q * (total - 1)
    # The row of rank ⌊rank⌋ is at or above an edge that at most ⌊rank⌋ rows are below.
    at_or_above = np.flatnonzero(below[1] <= math.floor(rank))
    at_or_below = np.flatnonzero(below[0] >= math.ceil(rank) + 1)
    low = float(edges[at_or_above[-1]]) if len(at_or_above) else bins.low if bins.public else None
    high = float(edges[at_or_below[0]]) if len(at_or_below) else bins.high if bins.public else None
    if low is None and high is None:
        return Quantile(value=None, low=None, high=None)
    middle = float(np.interp(rank + 0.5, below.mean(axis=0), edges))
    value = min(max(middle, low if low is not None else -math.inf), high if high is not None else math.inf)
    return Quantile(value=value, low=low, high=high)


def _shown(histograms: list[HistogramAnswer], bins: Bins) -> tuple[tuple[float | None, ...], tuple[int, ...]]:
    """The histogram of all rows on edges that each site has, at most SHOWN_BINS bins apart from the open ones."""
    common = set(histograms[0].ends).intersection(*(histogram.ends for histogram in histograms[1:]))
    last = bins.bins + 1
    step = -(-bins.bins // SHOWN_BINS)
    kept: list[int] = []
    for end in sorted(common - {last}):
        if not kept or end - kept[-1] >= step or end == bins.bins:
            kept.append(end)
    below = [sum(sum(h.counts[: bisect_right(h.ends, end)]) for h in histograms) for end in [*kept, last]]
    counts = [b - a for a, b in pairwise([0, *below])]
    inner = bins.edges.tolist()
    edges: list[float | None] = [None, *(inner[end] for end in kept), None]
    if bins.public:  # nothing lies outside
        edges[0], edges[-1] = bins.low, bins.high
        if kept and kept[0] == 0:
            edges, counts = edges[1:], [counts[0] + counts[1], *counts[2:]]
        if kept and kept[-1] == bins.bins:
            edges, counts = edges[:-1], [*counts[:-2], counts[-2] + counts[-1]]
        return tuple(edges), tuple(counts)
    if len(counts) > 1 and counts[0] == 0:  # an open bin without a row
        edges, counts = edges[1:], counts[1:]
    if len(counts) > 1 and counts[-1] == 0:
        edges, counts = edges[:-1], counts[:-1]
    return tuple(edges), tuple(counts)
