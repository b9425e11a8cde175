"""Staleness τ = (version at the merge) − (version trained from) → weight s(τ); each has s(0) = 1.

Polynomial and hinge are those of Xie et al., "Asynchronous Federated Optimization", arXiv 1903.03934, §5.2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

from fedqueue.config.aggregation import StalenessConfig
from fedqueue.config.entrypoint import is_entrypoint
from fedqueue.errors import ConfigurationError
from fedqueue_coordinator.algorithms.plugins import load_plugin

Staleness = Callable[[int], float]

SMALLEST = 2.0**-100
"""No weight is less: float32 holds it and what it multiplies, so a buffer of hopelessly stale updates has a mean."""


def constant() -> Staleness:
    """s(τ) = 1"""
    return lambda tau: 1.0


def polynomial(a: float = 0.5) -> Staleness:
    """s(τ) = (1 + τ)^−a"""
    return lambda tau: (1.0 + tau) ** -a


def hinge(a: float = 10.0, b: float = 4.0) -> Staleness:
    """s(τ) = 1 if τ ≤ b, else 1 / (a (τ − b) + 1)"""
    return lambda tau: 1.0 if tau <= b else 1.0 / (a * (tau - b) + 1.0)


def exponential(a: float = 0.1) -> Staleness:
    """s(τ) = e^(−a τ)"""
    return lambda tau: math.exp(-a * tau)


FUNCTIONS: dict[str, Callable[..., Staleness]] = {
    "constant": constant,
    "polynomial": polynomial,
    "hinge": hinge,
    "exponential": exponential,
}
TAKES: dict[str, str] = {"constant": "", "polynomial": "a", "hinge": "ab", "exponential": "a"}
TRIED = 1000
"""A function of the user's own is tried for τ up to this, so that a wrong one is told before the run."""


def make_staleness(config: StalenessConfig, folder: Path = Path()) -> Staleness:
    """The configured function, with its own defaults for the keys that are not set, and at least `SMALLEST`.

    Code of the user's own, relative to `folder`, takes τ and, where they are set, a and b as keywords. Raises
    ConfigurationError where it cannot be loaded, or where s(0) ≠ 1 or some s(τ) is not from 0 to 1.
    """
    options = {name: value for name in "ab" if (value := getattr(config, name)) is not None}
    if is_entrypoint(config.function):
        weigh = _own(config.function, options, folder)
    else:
        takes = TAKES[config.function]
        weigh = FUNCTIONS[config.function](**{name: value for name, value in options.items() if name in takes})
    return lambda tau: max(weigh(tau), SMALLEST)


def _own(name: str, options: dict[str, float], folder: Path) -> Staleness:
    key = "aggregation.staleness.function"
    function = load_plugin(name, folder, key)

    def weigh(tau: int) -> float:
        return float(function(tau, **options))

    try:
        weights = [weigh(tau) for tau in range(TRIED + 1)]
    except Exception as error:
        raise ConfigurationError(key, name, f"a function of tau; it raised {type(error).__name__}: {error}") from error
    if weights[0] != 1.0:
        raise ConfigurationError(key, name, f"a fresh update has weight 1, but s(0) is {weights[0]}")
    for tau, weight in enumerate(weights):
        if not 0.0 <= weight <= 1.0:  # NaN too
            raise ConfigurationError(key, name, f"weights from 0 to 1, but s({tau}) is {weight}")
    return weigh
