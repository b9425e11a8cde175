"""Makes the weight s(τ) that a configuration names: a built-in one (`fedqueue.staleness`), or the user's own."""

from __future__ import annotations

from pathlib import Path

from fedqueue.config.aggregation import StalenessConfig
from fedqueue.config.entrypoint import is_entrypoint
from fedqueue.errors import ConfigurationError
from fedqueue.staleness import MIN_WEIGHT, Staleness, built_in_staleness, options_of
from fedqueue_coordinator.algorithms.plugins import load_plugin

MAX_TESTED_STALENESS = 1000
"""The user's own function is tried for τ up to this, so that a mistake is reported before the run."""


def make_staleness(config: StalenessConfig, folder: Path = Path()) -> Staleness:
    """Make the configured function; it returns at least `MIN_WEIGHT`.

    The user's own function, loaded relative to `folder`, takes τ and, if they are set, a and b as keyword arguments.
    Raises ConfigurationError if it cannot be loaded, if s(0) ≠ 1, or if some s(τ) is not from 0 to 1.
    """
    if not is_entrypoint(config.function):
        return built_in_staleness(config)
    weigh = _own(config.function, options_of(config), folder)
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
