"""What a task may return as metrics: numbers by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedqueue.errors import TaskError
from fedqueue.protocol.messages import MAX_METRIC_NAME, MAX_METRICS


def as_metrics(metrics: Any, method: str) -> dict[str, float]:
    """Return `metrics`, which the task's `method` returned, as floats; NaN and infinity stay what they are.

    Raises TaskError, which names the metric, for a value that is no number, for a name that is empty or longer than
    MAX_METRIC_NAME characters, and for more than MAX_METRICS names. No value is part of the message.
    """
    if not isinstance(metrics, Mapping):
        raise TaskError(f"{method} returned {_kind(metrics)} as metrics: expected a dict of names and numbers")
    if len(metrics) > MAX_METRICS:
        raise TaskError(f"{method} returned {len(metrics)} metrics: expected at most {MAX_METRICS}")
    numbers = {str(name): as_number(str(name), value, f"{method} returned") for name, value in metrics.items()}
    if wrong := [name for name in numbers if not 0 < len(name) <= MAX_METRIC_NAME]:
        raise TaskError(f"{method} returned {wrong[0][:99]!r}: a metric's name has 1 to {MAX_METRIC_NAME} characters")
    return numbers


def as_number(name: str, value: Any, returned: str) -> float:
    """Return a number of Python, NumPy or torch, or a tensor or array with one element, as a float.

    Raises TaskError for anything else; the message begins with `returned`.
    """
    try:
        number = value.item() if hasattr(value, "item") else value  # a tensor with more elements raises
        if not isinstance(number, str | bytes):
            return float(number)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        pass
    expected = "a number: int, float, bool, or a NumPy or torch value with one element"
    raise TaskError(f"{returned} {name!r} as {_kind(value)}: expected {expected}") from None


def _kind(value: Any) -> str:
    """The type of `value`, and its shape if it has one."""
    if value is None:
        return "None"
    shape = getattr(value, "shape", None)
    return type(value).__name__ + (f" of shape {tuple(shape)}" if isinstance(shape, tuple) else "")
