"""Learning rates by step of a schedule: the server's by version, a client's by version and within a job."""

from __future__ import annotations

import functools
import inspect
import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch

from fedqueue.config.schedule import ScheduleConfig
from fedqueue.errors import ConfigurationError

SCHEDULER = torch.optim.lr_scheduler.LRScheduler
UNSUITED = {"reducelronplateau", "lambdalr", "multiplicativelr", "sequentiallr", "chainedscheduler"}
"""Schedulers that need a metric, a function or other schedulers, which a configuration cannot hold."""


class RateHolder(torch.optim.SGD):
    """An optimizer without a model, in which a scheduler of torch sets the learning rate."""

    def __init__(self, learning_rate: float) -> None:
        parameter = torch.nn.Parameter(torch.zeros(1))
        parameter.grad = torch.zeros(1)
        super().__init__([parameter], lr=learning_rate)


def learning_rates(learning_rate: float, schedule: ScheduleConfig, key: str, made: int = 0) -> Iterator[float]:
    """Yield the rate of step `made` + 1 of the schedule, then of each step after it, without end.

    After a restart the rates of the `made` steps are skipped, so no state has to be restored. `key` is the section of
    the configuration that contains the schedule. Raises ConfigurationError for an unknown schedule, or for options that
    it does not take.
    """
    return itertools.islice(_rates(learning_rate, schedule, key), made, None)


def rate_of_version(learning_rate: float, schedule: ScheduleConfig, key: str, version: int) -> float:
    """Return the rate of a job that trains from `version`; version 0 has the first rate of the schedule.

    Raises ConfigurationError, as `learning_rates`.
    """
    if schedule.name is None:
        return learning_rate
    return _table(learning_rate, schedule.model_dump_json(), key)[version]


class _Rates:
    """The rates of a schedule by position; each is computed once."""

    def __init__(self, rates: Iterator[float]) -> None:
        self._rates = rates
        self._known: list[float] = []

    def __getitem__(self, step: int) -> float:
        self._known.extend(itertools.islice(self._rates, max(0, step + 1 - len(self._known))))
        return self._known[step]


@functools.lru_cache(maxsize=8)
def _table(learning_rate: float, schedule: str, key: str) -> _Rates:
    return _Rates(_rates(learning_rate, ScheduleConfig.model_validate_json(schedule), key))


def _rates(learning_rate: float, schedule: ScheduleConfig, key: str) -> Iterator[float]:
    if schedule.name is None:
        return itertools.repeat(learning_rate)
    name, options = schedule.name.lower(), dict(schedule.schedule_options)
    if name == "inverse_sqrt":
        return inverse_sqrt(learning_rate, **_options_of_inverse_sqrt(options, key))
    known = _known()
    if name not in known:
        hint = f"known: {', '.join(sorted([*known, 'inverse_sqrt']))}"
        raise ConfigurationError(f"{key}.name", schedule.name, "unknown schedule", hint)
    optimizer = RateHolder(learning_rate)
    try:
        scheduler = known[name](optimizer, **options)
    except Exception as error:
        problem = f"torch.optim.lr_scheduler.{known[name].__name__}: {error}"
        raise ConfigurationError(f"{key}.schedule_options", options, problem) from error
    return _follow(optimizer, scheduler)


def inverse_sqrt(learning_rate: float, warmup: int = 0, decay: float = 1.0) -> Iterator[float]:
    """Yield η √(d / (d + t)) for step t + 1, after a linear increase over the first `warmup` steps."""
    for step in range(warmup):
        yield learning_rate * (step + 1) / (warmup + 1)
    for t in itertools.count():
        yield learning_rate * math.sqrt(decay / (decay + t))


def _options_of_inverse_sqrt(options: dict[str, Any], key: str) -> dict[str, Any]:
    warmup, decay = options.get("warmup", 0), options.get("decay", 1.0)
    sound = isinstance(warmup, int) and warmup >= 0 and isinstance(decay, float | int) and 0 < decay < math.inf
    if options.keys() - {"warmup", "decay"} or not sound:
        problem, hint = "not accepted by inverse_sqrt", "it takes warmup, an integer ≥ 0, and decay, a number > 0"
        raise ConfigurationError(f"{key}.schedule_options", options, problem, hint)
    return options


def _known() -> dict[str, Any]:
    found = {n.lower(): c for n, c in vars(torch.optim.lr_scheduler).items() if inspect.isclass(c) and n[0] != "_"}
    return {n: c for n, c in found.items() if issubclass(c, SCHEDULER) and c is not SCHEDULER and n not in UNSUITED}


def _follow(optimizer: RateHolder, scheduler: Any) -> Iterator[float]:
    """Yield the rates that `scheduler` sets in `optimizer`."""
    while True:
        yield float(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
