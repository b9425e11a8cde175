"""Learning rates of the server optimizer, one for each version: constant, or from the configured schedule."""

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
"""Schedulers that need a metric, a function or other schedulers, which a configuration cannot hold."""


def learning_rates(config: ServerOptimizerConfig, made: int = 0) -> Iterator[float]:
    """Yield the rate of version `made` + 1, then of each version after it, without end.

    After a restart the rates of the `made` versions are skipped, so no state has to be restored.
    Raises ConfigurationError for an unknown schedule, or for options that it does not take.
    """
    return itertools.islice(_rates(config), made, None)


def _rates(config: ServerOptimizerConfig) -> Iterator[float]:
    if config.schedule.name is None:
        return itertools.repeat(config.learning_rate)
    name = config.schedule.name.lower()
    if name == "inverse_sqrt":
        return inverse_sqrt(config.learning_rate, **_options_of_inverse_sqrt(config))
    known = _known()
    if name not in known:
        hint = f"known: {', '.join(sorted([*known, 'inverse_sqrt']))}"
        raise ConfigurationError("server_optimizer.schedule.name", config.schedule.name, "unknown schedule", hint)
    parameter = torch.nn.Parameter(torch.zeros(1))
    parameter.grad = torch.zeros(1)
    optimizer = torch.optim.SGD([parameter], lr=config.learning_rate)
    options = config.schedule.schedule_options
    try:
        scheduler = known[name](optimizer, **options)
    except (TypeError, ValueError) as error:
        problem = f"torch.optim.lr_scheduler.{known[name].__name__}: {error}"
        raise ConfigurationError("server_optimizer.schedule.schedule_options", dict(options), problem) from error
    return _follow(optimizer, scheduler)


def inverse_sqrt(learning_rate: float, warmup: int = 0, decay: float = 1.0) -> Iterator[float]:
    """Yield η √(d / (d + t)) for version t + 1, after a linear increase over the first `warmup` versions."""
    for version in range(warmup):
        yield learning_rate * (version + 1) / (warmup + 1)
    for t in itertools.count():
        yield learning_rate * math.sqrt(decay / (decay + t))


def _options_of_inverse_sqrt(config: ServerOptimizerConfig) -> dict[str, Any]:
    options = dict(config.schedule.schedule_options)
    warmup, decay = options.get("warmup", 0), options.get("decay", 1.0)
    sound = isinstance(warmup, int) and warmup >= 0 and isinstance(decay, float | int) and 0 < decay < math.inf
    if options.keys() - {"warmup", "decay"} or not sound:
        problem, hint = "not accepted by inverse_sqrt", "it takes warmup, an integer ≥ 0, and decay, a number > 0"
        raise ConfigurationError("server_optimizer.schedule.schedule_options", options, problem, hint)
    return options


def _known() -> dict[str, Any]:
    found = {n.lower(): c for n, c in vars(torch.optim.lr_scheduler).items() if inspect.isclass(c) and n[0] != "_"}
    return {n: c for n, c in found.items() if issubclass(c, SCHEDULER) and c is not SCHEDULER and n not in UNSUITED}


def _follow(optimizer: torch.optim.Optimizer, scheduler: Any) -> Iterator[float]:
    """Yield the rates that `scheduler` sets in `optimizer`, whose only parameter exists for this purpose."""
    while True:
        yield float(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
