"""Weights s(τ) by staleness τ = (version at the merge) − (version trained from); each function has s(0) = 1.

Polynomial and hinge are from Xie et al., "Asynchronous Federated Optimization", arXiv 1903.03934, §5.2.
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

MIN_WEIGHT = 2.0**-100
"""The least weight. Float32 represents it and its products, so a buffer of very stale updates still has a mean."""


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
PARAMETERS: dict[str, str] = {"constant": "", "polynomial": "a", "hinge": "ab", "exponential": "a"}
MAX_TESTED_STALENESS = 1000
"""The user's own function is tried for τ up to this, so that a mistake is reported before the run."""


def make_staleness(config: StalenessConfig, folder: Path = Path()) -> Staleness:
    """Make the configured function; it returns at least `MIN_WEIGHT`.

    A key that is not set has the function's default.

    The user's own function, loaded relative to `folder`, takes τ and, if they are set, a and b as keyword arguments.
    Raises ConfigurationError if it cannot be loaded, if s(0) ≠ 1, or if some s(τ) is not from 0 to 1.
    """
    options = {name: value for name in "ab" if (value := getattr(config, name)) is not None}
    if is_entrypoint(config.function):
        weigh = _own(config.function, options, folder)
    else:
        takes = PARAMETERS[config.function]
        weigh = FUNCTIONS[config.function](**{name: value for name, value in options.items() if name in takes})
    return lambda tau: max(weigh(tau), MIN_WEIGHT)


def _own(name: str, options: dict[str, float], folder: Path) -> Staleness:
    key = "aggregation.staleness.function"
    function = load_plugin(name, folder, key)

    def weigh(tau: int) -> float:
        return float(function(tau, **options))

    try:
        weights = [weigh(tau) for tau in range(MAX_TESTED_STALENESS + 1)]
    except Exception as error:
        problem = f"raised {type(error).__name__}: {error}"
        raise ConfigurationError(key, name, problem, "name a function of tau that returns a number") from error
    if weights[0] != 1.0:
        raise ConfigurationError(key, name, f"s(0) is {weights[0]}", "the weight of a fresh update must be 1")
    for tau, weight in enumerate(weights):
        if not 0.0 <= weight <= 1.0:  # NaN too
            raise ConfigurationError(key, name, f"s({tau}) is {weight}", "weights must be from 0 to 1")
    return weigh
