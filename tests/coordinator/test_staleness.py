"""Staleness functions: results by hand, comparison with the oracle, and properties of all functions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from fedqueue.config.aggregation import StalenessConfig
from fedqueue.staleness import MIN_WEIGHT, constant, exponential, hinge, polynomial
from fedqueue_coordinator.algorithms.staleness import make_staleness
from tests.support.oracle import STALENESS

FUNCTIONS = sorted(STALENESS)


@pytest.mark.parametrize(
    ("function", "tau", "weight"),
    [
        (constant(), 9, 1.0),
        (polynomial(), 3, 0.5),  # 1 / √4
        (polynomial(a=1.0), 3, 0.25),
        (hinge(), 4, 1.0),
        (hinge(), 5, 1 / 11),
        (hinge(a=2.0, b=1.0), 3, 1 / 5),
        (exponential(), 10, 1 / math.e),
        (exponential(a=math.log(2)), 3, 1 / 8),
    ],
)
def test_weights_match_results_by_hand(function: Callable[..., Any], tau: int, weight: float) -> None:
    assert function(tau) == pytest.approx(weight, rel=1e-15)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_staleness_defaults_agree_with_the_oracle(name: str) -> None:
    function = make_staleness(StalenessConfig(function=name))
    assert [function(tau) for tau in range(101)] == pytest.approx([STALENESS[name](tau) for tau in range(101)])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("polynomial", {"a": 1.5}),
        ("hinge", {"a": 0.5}),
        ("hinge", {"b": 0.0}),
        ("hinge", {"a": 3.0, "b": 2.0}),
        ("exponential", {"a": 0.7}),
    ],
)
def test_configured_function_uses_the_configured_parameters(name: str, options: dict[str, Any]) -> None:
    function = make_staleness(StalenessConfig(function=name, **options))
    assert [function(tau) for tau in range(30)] == pytest.approx([STALENESS[name](t, **options) for t in range(30)])


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("a", [None, 0.01, 3.0])
def test_fresh_update_has_weight_one_exactly(name: str, a: float | None) -> None:
    assert make_staleness(StalenessConfig(function=name, a=a))(0) == 1.0


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("a", [None, 0.01, 1.0, 1e3, 1e308])
def test_staleness_weight_is_positive_and_never_increases(name: str, a: float | None) -> None:
    function = make_staleness(StalenessConfig(function=name, a=a))
    weights = [function(tau) for tau in [*range(200), 10**6]]
    assert all(MIN_WEIGHT <= weight <= 1.0 for weight in weights)
    assert weights == sorted(weights, reverse=True)
