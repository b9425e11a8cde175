"""Stop conditions: the configured limits of a run, and its target."""

from __future__ import annotations

from collections.abc import Mapping

from fedqueue.config.schema import StopConfig
from fedqueue_coordinator.core.events import Evaluated


def stop_reason(config: StopConfig, version: int, updates: int, seconds: float) -> str:
    """Describe the limit that is reached; an empty string if no limit is."""
    if config.versions and version >= config.versions:
        return f"versions: {version} of {config.versions}"
    if config.updates and updates >= config.updates:
        return f"updates: {updates} of {config.updates}"
    if config.seconds and seconds >= config.seconds:
        return f"seconds: {config.seconds:g}"
    return ""


def target_reached(target: Mapping[str, float], evaluated: Evaluated) -> str:
    """Describe the target if every metric of it is reached; an empty string otherwise."""
    if not target or not all(_meets(name, evaluated.metrics.get(name), value) for name, value in target.items()):
        return ""
    reached = ", ".join(f"{name} {evaluated.metrics[name]:.4f} (target {value:g})" for name, value in target.items())
    return f"target: {reached} at version {evaluated.version}"


def lower_is_better(metric: str) -> bool:
    """Whether a metric with this name improves by falling: a loss or an error."""
    return metric.endswith(("loss", "error"))


def _meets(name: str, value: float | None, target: float) -> bool:
    if value is None:
        return False
    return value <= target if lower_is_better(name) else value >= target
