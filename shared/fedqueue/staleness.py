"""The built-in weights s(τ) by staleness τ = (version at the merge) − (version trained from), each with s(0) = 1.

Here, because a keeper computes them too (`secure/ring.py`). Functions of the user's own are loaded by the coordinator.

Polynomial and hinge are from Xie et al., "Asynchronous Federated Optimization", arXiv 1903.03934, §5.2.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from fedqueue.config.aggregation import StalenessConfig

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


def built_in_staleness(config: StalenessConfig) -> Staleness:
    """The configured built-in function; it returns at least `MIN_WEIGHT`.

    A key that is not set has the function's default. Raises KeyError for a function that is not built in.
    """
    takes = PARAMETERS[config.function]
    weigh = FUNCTIONS[config.function](**options_of(config, takes))
    return lambda tau: max(weigh(tau), MIN_WEIGHT)


def options_of(config: StalenessConfig, names: str = "ab") -> dict[str, float]:
    """Those keyword arguments of a staleness function that are set, out of `names`."""
    return {name: value for name in names if (value := getattr(config, name)) is not None}
