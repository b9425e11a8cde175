"""Statistics of sites add up to those of the pooled rows, and no figure of a site is about too few rows."""

from __future__ import annotations

import math
import random
import statistics as exact
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedqueue.errors import TaskError
from fedqueue.statistics.exact_sum import as_fraction, exact_sum, exact_sum_of_squares
from fedqueue.statistics.pooled import Statistics, common_bins, merge
from fedqueue.statistics.site_answers import (
    STATISTICS,
    Bins,
    CategoriesAnswer,
    NumbersAnswer,
    SiteTable,
    StatisticName,
    grouped,
    large_enough,
)
from fedqueue.statistics.table import read_table

NAN = float("nan")
wide = st.floats(-1e12, 1e12, allow_nan=False)


def describe(
    tables: dict[str, dict[str, Any]],
    min_count: int = 1,
    bounds: dict[str, tuple[float, float]] | None = None,
    allowed: Sequence[StatisticName] = STATISTICS,
    bins: int = 64,
) -> Statistics:
    """What the sites' answers, each of which has been through JSON, are merged to."""
    sites = {name: SiteTable(read_table(table), min_count, allowed) for name, table in tables.items()}
    first = {name: type(a).model_validate_json(a.model_dump_json()) for name, a in asked(sites).items()}
    edges = common_bins(first, bins, bounds or {})
    second = {name: site.second_answer(edges) for name, site in sites.items()}
    return merge("run", first, second, edges, {})


def asked(sites: dict[str, SiteTable]) -> dict[str, Any]:
    return {name: site.first_answer() for name, site in sites.items()}


def divided(values: Sequence[Any], sites: int, seed: int) -> dict[str, dict[str, Any]]:
    """The values as column `x` of several sites, each of which has at least one."""
    rng = np.random.default_rng(seed)
    of_site = np.concatenate([np.arange(sites), rng.integers(0, sites, max(0, len(values) - sites))])[: len(values)]
    return {f"site-{i}": {"x": np.array(values)[of_site == i]} for i in range(sites) if np.any(of_site == i)}


@given(st.lists(wide | st.floats(-1e140, 1e140), max_size=50))
def test_a_sum_is_exact_whatever_its_order(values: list[float]) -> None:
    shuffled = random.Random(1).sample(values, len(values))
    assert exact_sum(values) == exact_sum(shuffled)
    assert as_fraction(exact_sum(values)) == sum(map(Fraction, values), Fraction(0))
    squares = exact_sum_of_squares(np.array(values, dtype=np.float64))
    assert abs(as_fraction(squares) - sum((Fraction(v) ** 2 for v in values), Fraction(0))) <= len(values) * 5e-324


@given(st.lists(wide | st.just(NAN), min_size=1, max_size=80), st.integers(1, 5), st.integers(0, 99))
def test_moments_equal_those_of_the_pooled_rows(values: list[float], sites: int, seed: int) -> None:
    found = describe(divided(values, sites, seed)).columns.get("x")
    rows = [Fraction(value) for value in values if not math.isnan(value)]
    if not rows:
        assert found is None
        return
    assert found is not None
    assert found.kind == "numbers"
    assert found.count == len(rows)
    assert found.missing == len(values) - len(rows)
    assert found.mean == float(sum(rows) / len(rows))
    if len(rows) > 1:
        assert found.variance == pytest.approx(float(exact.variance(rows)), rel=1e-15, abs=1e-300)


@settings(max_examples=60)
@given(
    st.lists(st.floats(-1e6, 1e6, allow_nan=False), min_size=30, max_size=200),
    st.integers(1, 4),
    st.sampled_from([1, 5, 10]),
    st.integers(0, 99),
)
def test_a_quantile_is_within_its_bound(values: list[float], sites: int, min_count: int, seed: int) -> None:
    tables = divided(values, sites, seed)
    described = [t["x"] for t in tables.values() if len(t["x"]) >= min_count]
    column = describe(tables, min_count).columns.get("x")
    if column is None:
        assert not described
        return
    assert column.kind == "numbers"
    pooled = np.concatenate(described)
    for q, quantile in column.quantiles.items():
        for method in ("linear", "lower", "higher"):
            true = np.quantile(pooled, float(q), method=method)
            assert quantile.low is None or quantile.low <= true
            assert quantile.high is None or true <= quantile.high
        if quantile.value is not None and quantile.low is not None and quantile.high is not None:
            assert quantile.low <= quantile.value <= quantile.high


def test_a_histogram_counts_the_pooled_rows() -> None:
    values = np.random.default_rng(0).normal(50, 9, 400)
    column = describe(divided(values.tolist(), 3, 0)).numbers("x")
    inner = np.array([edge for edge in column.edges if edge is not None])
    expected = np.histogram(values, [-np.inf, *inner, np.inf])[0]
    assert column.counts == tuple(expected[int(column.edges[0] is not None) :][: len(column.counts)])
    assert sum(column.counts) == 400
    width = max(b - a for a, b in pairwise(inner))
    assert column.quantiles["0.5"].value == pytest.approx(np.median(values), abs=width)


def test_values_at_the_end_of_their_range_are_inside() -> None:
    quantile = describe({"north": {"x": np.full(20, -2.0)}}).numbers("x").quantiles["0.5"]
    assert quantile.low is not None
    assert quantile.low < -2.0
    assert quantile.high == -2.0


def test_public_bounds_close_the_outer_bins() -> None:
    values = np.random.default_rng(0).uniform(20, 90, 300)
    column = describe(divided(values.tolist(), 2, 0), 10, {"x": (0.0, 128.0)}).numbers("x")
    assert (column.edges[0], column.edges[-1], sum(column.counts)) == (0.0, 128.0, 300)
    quantile = column.quantiles["0.05"]
    assert quantile.low is not None
    assert quantile.high is not None
    assert quantile.low <= np.quantile(values, 0.05) <= quantile.high


@settings(max_examples=40)
@given(st.integers(0, 2**31), st.integers(2, 12))
def test_no_figure_of_a_site_is_about_few_rows(seed: int, min_count: int) -> None:
    rng = np.random.default_rng(seed)
    rows = int(rng.integers(1, 80))
    x = np.where(rng.random(rows) < rng.random() / 2, NAN, rng.choice([0.0, -3.0, 1e6, 5.5], rows) * rng.random(rows))
    text = rng.choice(["a", "b", "c", "", "d"], rows, p=[0.5, 0.3, 0.1, 0.05, 0.05])
    site = SiteTable(read_table({"x": x, "text": text}), min_count)
    first = site.first_answer()
    second = site.second_answer(common_bins({"": first}, 16, {}))
    figures = [first.rows]
    answers: list[NumbersAnswer | CategoriesAnswer] = [*first.numbers.values(), *first.categories.values()]
    for of in answers:
        assert of.count + of.missing == first.rows
        figures += [of.count, of.missing]
    for category in first.categories.values():
        assert sum(category.counts.values()) + category.other == category.count
        figures += [*category.counts.values(), category.other]
    for name, histogram in second.histograms.items():
        assert sum(histogram.counts) == first.numbers[name].count
        figures += histogram.counts
    assert all(figure == 0 or figure >= min_count for figure in figures)


def test_a_row_far_away_changes_no_range() -> None:
    values = np.random.default_rng(1).uniform(40, 60, 100)
    plain = SiteTable(read_table({"x": values}), 10).first_answer().numbers["x"]
    outlier = SiteTable(read_table({"x": np.append(values, 1e9)}), 10).first_answer().numbers["x"]
    assert (outlier.low, outlier.high) == (plain.low, plain.high) == (32.0, 64.0)


@given(st.lists(st.integers(0, 30), min_size=1, max_size=60), st.integers(2, 12))
def test_each_bin_has_enough_rows(counts: list[int], min_count: int) -> None:
    answer = grouped(counts, min_count)
    assert all(count >= min_count for count in answer.counts)
    if sum(counts) >= min_count:
        assert sum(answer.counts) == sum(counts)
        assert answer.ends[-1] == len(counts) - 1


@given(st.dictionaries(st.text(min_size=1, max_size=4), st.integers(0, 30), max_size=20), st.integers(1, 12))
def test_each_category_and_all_others_have_enough_rows(counts: dict[str, int], min_count: int) -> None:
    named, other = large_enough(counts, min_count)
    total = sum(counts.values())
    assert sum(named.values()) + other == total
    assert all(count >= min_count and counts[name] == count for name, count in named.items())
    assert other == 0 or other >= min_count or total < min_count


def test_shares_equal_those_of_the_pooled_rows() -> None:
    labels = ["yes"] * 40 + ["no"] * 55 + ["perhaps"] * 5 + [""] * 20
    column = describe(divided(labels, 3, 4)).categories("x")
    assert column.counts == {"no": 55, "perhaps": 5, "yes": 40}
    assert (column.count, column.missing, column.other) == (100, 20, 0)
    assert column.shares["yes"] == 0.4


def test_few_missing_values_are_no_small_number() -> None:
    values = np.arange(100.0)
    values[:3] = NAN
    site = SiteTable(read_table({"x": values, "whole": np.arange(100.0)}), 10)
    answer = site.first_answer().numbers["x"]
    assert (answer.count, answer.missing, answer.set_aside) == (90, 10, True)
    assert SiteTable(read_table({"x": values, "whole": np.ones(100)}), 10).first_answer().numbers["x"] == answer
    histogram = site.second_answer({"x": Bins(low=0.0, high=128.0, bins=8)}).histograms["x"]
    assert sum(histogram.counts) == 90


def test_few_values_and_small_tables_are_not_described() -> None:
    values = np.full(100, NAN)
    values[:9] = 1.0
    answer = SiteTable(read_table({"x": values, "y": np.arange(100.0)}), 10).first_answer()
    assert answer.too_few == ("x",)
    small = SiteTable(read_table({"y": np.arange(9.0)}), 10)
    assert (small.first_answer().rows, small.first_answer().numbers) == (0, {})
    assert small.second_answer({"y": Bins(low=0.0, high=16.0, bins=4)}).histograms == {}


def test_rows_of_a_site_with_too_few_values_count_as_missing() -> None:
    south = np.full(30, NAN)
    south[:4] = 1.0
    found = describe({"north": {"x": np.arange(40.0)}, "south": {"x": south}}, 10)
    assert (found.numbers("x").count, found.numbers("x").missing) == (40, 30)
    assert found.hides_missing("x")
    assert found.too_few == {"south": ("x",)}


def test_a_policy_keeps_statistics_back() -> None:
    site = SiteTable(read_table({"x": np.arange(50.0), "ill": np.arange(50) < 20}), 10, ("count", "mean"))
    answer = site.first_answer()
    assert answer.kept_back == ("variance", "histogram", "categories")
    x = answer.numbers["x"]
    assert (x.sum, x.squares, x.low, x.high) == ((1225.0,), None, None, None)
    assert answer.categories["ill"].counts == {}
    assert site.second_answer({"x": Bins(low=0.0, high=64.0, bins=4)}).histograms == {}


def test_columns_of_different_kinds_are_refused() -> None:
    tables = {"north": {"x": np.arange(20.0)}, "south": {"x": np.array(["1"] * 20)}}
    with pytest.raises(TaskError, match="numbers at north and categories at south"):
        describe(tables)


@pytest.mark.parametrize(
    ("table", "problem"),
    [
        (None, "NoneType"),
        ({}, "no column"),
        ({"x": np.zeros((2, 2))}, r"shape \(2, 2\)"),
        ({"x": [1.0, 2.0], "y": [1.0]}, "'x' has 2 rows, column 'y' has 1"),
        ({"x": [1.0, float("inf")]}, "infinite"),
        ({"x": np.array([2**53 + 1])}, "integers above"),
        ({"x": np.array(["a" * 65])}, "texts above 64"),
        ({"x": np.array([{}, []], dtype=object)}, "objects"),
        ({"x": np.array(["2026-01-01"], dtype="datetime64[D]")}, "datetime64"),
        ({3: [1.0]}, "name"),
    ],
)
def test_a_table_of_another_form_is_refused_by_name(table: Any, problem: str) -> None:
    with pytest.raises(TaskError, match=problem):
        read_table(table)


def test_objects_are_read_as_what_they_are() -> None:
    columns = read_table(
        {
            "number": np.array([1, None, 2.5], dtype=object),
            "text": np.array(["a", None, ""], dtype=object),
            "truth": np.array([True, None, False], dtype=object),
        }
    )
    assert [int(column.missing.sum()) for column in columns.values()] == [1, 2, 1]
    assert np.nansum(columns["number"].values) == 3.5
