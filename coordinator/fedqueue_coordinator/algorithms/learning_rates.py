"""The server's learning rate, version by version: constant, or after a schedule that the configuration names."""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch

from fedqueue.config.aggregation import ServerOptimizerConfig
from fedqueue.errors import ConfigurationError

SCHEDULER = torch.optim.lr_scheduler.LRScheduler
UNSUITED = {"reducelronplateau", "lambdalr", "multiplicativelr", "sequentiallr", "chainedscheduler"}
"""They need a metric, a function or other schedulers, none of which a configuration holds."""


def learning_rates(config: ServerOptimizerConfig, made: int = 0) -> Iterator[float]:
    """The rate of version `made` + 1, of the one after it, and so on without end.

    A successor gets the same rates by going through those of the versions that were made: there is no state to restore.
    Raises ConfigurationError for a schedule that is unknown or does not take its options.
    """
    return itertools.islice(_rates(config), made, None)


def _rates(config: ServerOptimizerConfig) -> Iterator[float]:
    name = config.schedule.name.lower()
    if not name:
        return itertools.repeat(config.learning_rate)
    if name == "inverse_sqrt":
        return inverse_sqrt(config.learning_rate, **_options_of_inverse_sqrt(config))
    known = _known()
    if name not in known:
        accepted = f"known: {', '.join(sorted([*known, 'inverse_sqrt']))}"
        raise ConfigurationError("server_optimizer.schedule.name", config.schedule.name, accepted)
    parameter = torch.nn.Parameter(torch.zeros(1))
    parameter.grad = torch.zeros(1)
    optimizer = torch.optim.SGD([parameter], lr=config.learning_rate)
    options = config.schedule.options
    try:
        scheduler = known[name](optimizer, **options)
    except (TypeError, ValueError) as error:
        accepted = f"torch.optim.lr_scheduler.{known[name].__name__}: {error}"
        raise ConfigurationError("server_optimizer.schedule.options", dict(options), accepted) from error
    return _follow(optimizer, scheduler)


def inverse_sqrt(learning_rate: float, warmup: int = 0, decay: float = 1.0) -> Iterator[float]:
    """η √(d / (d + t)) for version t + 1, after a linear rise over the first `warmup` versions."""
    for version in range(warmup):
        yield learning_rate * (version + 1) / (warmup + 1)
    for t in itertools.count():
        yield learning_rate * math.sqrt(decay / (decay + t))


def _options_of_inverse_sqrt(config: ServerOptimizerConfig) -> dict[str, Any]:
    options = dict(config.schedule.options)
    warmup, decay = options.get("warmup", 0), options.get("decay", 1.0)
    sound = isinstance(warmup, int) and warmup >= 0 and isinstance(decay, float | int) and 0 < decay < math.inf
    if options.keys() - {"warmup", "decay"} or not sound:
        accepted = "inverse_sqrt takes warmup, an integer ≥ 0, and decay, a number > 0"
        raise ConfigurationError("server_optimizer.schedule.options", options, accepted)
    return options


def _known() -> dict[str, Any]:
    found = {n.lower(): c for n, c in vars(torch.optim.lr_scheduler).items() if inspect.isclass(c) and n[0] != "_"}
    return {n: c for n, c in found.items() if issubclass(c, SCHEDULER) and c is not SCHEDULER and n not in UNSUITED}


def _follow(optimizer: torch.optim.Optimizer, scheduler: Any) -> Iterator[float]:
    """A scheduler moves the rate of the optimizer that it was made for: here one whose parameter nobody needs."""
    while True:
        yield float(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
