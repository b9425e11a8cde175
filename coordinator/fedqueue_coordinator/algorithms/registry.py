"""The aggregation that a configuration names: one of ours, or the user's own.

A factory takes the configuration and, as keyword arguments, `aggregation.options`; it returns an `Aggregator`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from fedqueue.config.loading import Config
from fedqueue.errors import ConfigurationError
from fedqueue.training import make_optimizer, optimizer_class
from fedqueue_coordinator.algorithms.aggregator import Aggregator, fedasync, fedavg, fedbuff
from fedqueue_coordinator.algorithms.ca2fl import ca2fl
from fedqueue_coordinator.algorithms.fadas import fadas
from fedqueue_coordinator.algorithms.plugins import load_plugin
from fedqueue_coordinator.algorithms.robust import make_rule, robust_fedbuff
from fedqueue_coordinator.algorithms.running_statistics import with_running_statistics
from fedqueue_coordinator.algorithms.server_optimizer import try_out
from fedqueue_coordinator.algorithms.staleness import Staleness, constant, make_staleness

Factory = Callable[..., Aggregator]


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
    mean = _buffered(config, constant())  # the paper's mean is unweighted: a delay shrinks the rate instead
    return fadas(mean, learning_rate, (betas[0], betas[1]), eps, delay_threshold, delay_rule)


def _ca2fl(config: Config, cache_clients: int = 0) -> Aggregator:
    clients = len(config.clients.ids)
    return ca2fl(config.buffer_size, clients, cache_clients or clients)


AGGREGATORS: dict[str, Factory] = {
    "fedasync": _fedasync,
    "fedbuff": _fedbuff,
    "fedavg": _fedavg,
    "fadas": _fadas,
    "ca2fl": _ca2fl,
}


def make_aggregator(config: Config) -> Aggregator:
    """Raises ConfigurationError for a mode that cannot be loaded, and for options that it does not take."""
    mode, options = config.aggregation.mode, config.aggregation.options
    own = mode not in AGGREGATORS
    factory = load_plugin(mode, config.folder, "aggregation.mode") if own else AGGREGATORS[mode]
    try:
        aggregator = factory(config, **options)
    except (TypeError, ValueError, IndexError) as error:
        raise ConfigurationError("aggregation.options", options, f"{mode}: {error}") from error
    if own:
        _require_agreement(config, aggregator)
    return with_running_statistics(aggregator, config.aggregation.running_statistics)


def check_algorithms(config: Config) -> None:
    """What is wrong with an optimizer, a schedule or an aggregation is to be told before a run, not in it.

    Raises ConfigurationError.
    """
    training = config.training
    optimizer_class(training.optimizer)
    if training.options:  # else there is nothing that could be wrong, and a coordinator needs no optimizer itself
        parameters = [torch.nn.Parameter(torch.zeros(1))]
        make_optimizer(training.optimizer, parameters, training.learning_rate, training.options)
    try_out(config.server_optimizer)
    make_aggregator(config)


def _require_agreement(config: Config, made: object) -> None:
    """Dispatcher and workers go by the configuration alone, so the user's algorithm must not differ from it."""
    mode = config.aggregation.mode
    if not isinstance(made, Aggregator):
        raise ConfigurationError("aggregation.mode", mode, f"must make an Aggregator, it made a {type(made).__name__}")
    if made.buffer_size != config.buffer_size:
        raise ConfigurationError("aggregation.buffer_size", config.buffer_size, f"{mode} merges {made.buffer_size}")
    if made.needs_base != config.aggregation.needs_base:
        expected = config.aggregation.needs_base
        raise ConfigurationError("aggregation.needs_base", expected, f"{mode} says {made.needs_base}")
