"""Stop conditions: the configured limits of a run, and its target."""

from __future__ import annotations

from collections.abc import Sequence

from fedqueue.config.schema import StopConfig
from fedqueue.config.target import Goal
from fedqueue.errors import ConfigurationError
from fedqueue_coordinator.core.events import Evaluated


def stop_reason(config: StopConfig, version: int, updates: int, seconds: float | None) -> str:
    """Describe the limit that is reached; an empty string if no limit is.

    `seconds` are those since the clients began to train, or None before.
    """
    if config.versions and version >= config.versions:
        return f"versions: {version} of {config.versions}"
    if config.updates and updates >= config.updates:
        return f"updates: {updates} of {config.updates}"
    if config.seconds and seconds is not None and seconds >= config.seconds:
        return f"seconds: {config.seconds:g}"
    return ""


def target_reached(goals: Sequence[Goal], evaluated: Evaluated) -> str:
    """Describe the target if `evaluated` meets every goal; an empty string otherwise, and without a goal."""
    if not goals or not all(goal.is_met(evaluated.metrics.get(goal.metric)) for goal in goals):
        return ""
    reached = ", ".join(f"{g.metric} {evaluated.metrics[g.metric]:.4f} (target {g.value:g})" for g in goals)
    return f"target: {reached} at version {evaluated.version}"


def require_usable_target(goals: Sequence[Goal], evaluated: Evaluated, key: str = "stop.target") -> None:
    """Raise ConfigurationError about `key` if the first evaluation of a run shows that its target can tell nothing.

    That is a target with a metric that was not measured, and one that version 0 meets before any training.
    """
    missing = [goal.metric for goal in goals if goal.metric not in evaluated.metrics]
    if missing:
        came = ", ".join(evaluated.metrics) or "no metric"
        hint = "name a metric that evaluate returns, or let evaluate return this one"
        problem = f"{', '.join(missing)} is not measured: the task's evaluate returned {came}"
        raise ConfigurationError(key, None, problem, hint)
    if evaluated.version == 0 and target_reached(goals, evaluated):
        has = ", ".join(f"{goal.metric} {evaluated.metrics[goal.metric]:.4g}" for goal in goals)
        hint = "set a target that training has to reach; { below = … } and { above = … } state its direction"
        problem = f"the model before any training already has {has}, which meets {', '.join(map(str, goals))}"
        raise ConfigurationError(key, None, problem, hint)
