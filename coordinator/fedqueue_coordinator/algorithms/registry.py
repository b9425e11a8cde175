"""Makes the aggregation that a configuration names: a built-in one, or the user's own.

A factory takes the configuration and, as keyword arguments, `aggregation.strategy_options`. It returns an `Aggregator`.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch

from fedqueue.config.schema import Config
from fedqueue.errors import ConfigurationError, MissingExtra
from fedqueue.staleness import Staleness, constant
from fedqueue.training import check_training
from fedqueue_coordinator.algorithms.aggregator import Aggregator
from fedqueue_coordinator.algorithms.buffer_rules import with_buffer_rules
from fedqueue_coordinator.algorithms.ca2fl import ca2fl
from fedqueue_coordinator.algorithms.fadas import fadas
from fedqueue_coordinator.algorithms.fedasync import fedasync
from fedqueue_coordinator.algorithms.fedavg import fedavg
from fedqueue_coordinator.algorithms.fedbuff import fedbuff
from fedqueue_coordinator.algorithms.plugins import load_plugin
from fedqueue_coordinator.algorithms.robust import make_rule, robust_fedbuff
from fedqueue_coordinator.algorithms.server_optimizer import try_out
from fedqueue_coordinator.algorithms.staleness import make_staleness

Factory = Callable[..., Aggregator]
COMPILED = ("float16", "bfloat16", "int8", "topk")
"""Encodings that numba's kernels merge."""


def _staleness(config: Config) -> Staleness:
    return make_staleness(config.aggregation.staleness, config.folder)


def _buffered(config: Config, staleness: Staleness) -> Aggregator:
    settings = config.aggregation
    if settings.robust.rule != "mean":
        return robust_fedbuff(config.buffer_size, staleness, make_rule(settings.robust))
    return fedbuff(config.buffer_size, staleness, settings.normalize, settings.weight_by_examples)


def _fedasync(config: Config) -> Aggregator:
    return fedasync(config.aggregation.alpha, _staleness(config), config.aggregation.mixing)


def _fedbuff(config: Config) -> Aggregator:
    return _buffered(config, _staleness(config))


def _fedavg(config: Config) -> Aggregator:
    return fedavg(config.buffer_size)


def _fadas(
    config: Config,
    learning_rate: float = 0.01,
    betas: tuple[float, float] = (0.9, 0.99),
    eps: float = 1e-8,
    delay_threshold: int = 10,
    delay_rule: str = "bound",
) -> Aggregator:
    mean = _buffered(config, constant())  # the paper's mean is unweighted; a delay lowers the rate instead
    return fadas(mean, learning_rate, (betas[0], betas[1]), eps, delay_threshold, delay_rule)


def _ca2fl(config: Config, cache_clients: int = 0) -> Aggregator:
    clients = config.clients.number
    return ca2fl(config.buffer_size, clients, cache_clients or clients)


AGGREGATORS: dict[str, Factory] = {
    "fedasync": _fedasync,
    "fedbuff": _fedbuff,
    "fedavg": _fedavg,
    "fadas": _fadas,
    "ca2fl": _ca2fl,
}


def make_aggregator(config: Config) -> Aggregator:
    """Make the configured aggregator.

    Raises ConfigurationError for a strategy that cannot be loaded, and for options that it does not take.
    """
    strategy, options = config.aggregation.strategy, config.aggregation.strategy_options
    own = strategy not in AGGREGATORS
    factory = load_plugin(strategy, config.folder, "aggregation.strategy") if own else AGGREGATORS[strategy]
    try:
        aggregator = factory(config, **options)
    except (TypeError, ValueError, IndexError) as error:
        raise ConfigurationError("aggregation.strategy_options", options, f"{strategy}: {error}") from error
    if own:
        _require_agreement(config, aggregator)
    return with_buffer_rules(aggregator, config.aggregation)


def check_algorithms(config: Config) -> None:
    """Try the configured optimizers, schedule and aggregation, so that a mistake is reported before the run begins.

    Raises ConfigurationError, and MissingExtra if the coordinator lacks the package that merges encoded updates.
    """
    check_training(config.training, torch.device("cpu"))
    try_out(config.server_optimizer)
    make_aggregator(config)
    if config.compression.uplink in COMPILED and find_spec("numba") is None:
        raise MissingExtra("merging encoded updates", "numba", "compression")


def _require_agreement(config: Config, made: object) -> None:
    """Raise ConfigurationError if the user's aggregator contradicts the configuration, which workers read too."""
    strategy = config.aggregation.strategy
    if not isinstance(made, Aggregator):
        raise ConfigurationError(
            "aggregation.strategy", strategy, f"made a {type(made).__name__}", "return a fedqueue.Aggregator"
        )
    if made.buffer_size != config.buffer_size:
        raise ConfigurationError(
            "aggregation.buffer_size", config.buffer_size, f"{strategy} merges {made.buffer_size}", "make them equal"
        )
    if made.needs_base != config.aggregation.needs_base:
        expected = config.aggregation.needs_base
        raise ConfigurationError(
            "aggregation.needs_base", expected, f"{strategy} says {made.needs_base}", "make them equal"
        )
