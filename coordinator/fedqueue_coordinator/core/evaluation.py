"""Central evaluation: which versions are evaluated, and the evaluation of one version."""

from __future__ import annotations

import math
from typing import Any

import torch

from fedqueue.config.schema import EvaluationConfig
from fedqueue.exception_text import exception_with_place
from fedqueue.protocol.messages import Evaluation
from fedqueue.task import Task
from fedqueue.tensors.frame import Frame


class EvaluationSchedule:
    """Chooses versions by their number and by time; at most one evaluation is in progress."""

    def __init__(self, config: EvaluationConfig, enabled: bool) -> None:
        """`enabled` is false if the task has no test data."""
        self._config, self._enabled = config, enabled
        self._running = False
        self._last = (-1, 0.0)  # version, time

    def begin_if_due(self, version: int, now: float) -> bool:
        """Whether `version` must be evaluated now; if so, its evaluation is in progress until `finished`."""
        last, at = self._last
        every_versions, every_seconds = self._config.every_versions, self._config.every_seconds
        due = (every_versions and (last < 0 or version >= last + every_versions)) or (
            every_seconds and version > last and now >= at + every_seconds
        )
        if not (due and self._enabled) or self._running:
            return False
        self._running = True
        self._last = (version, now)
        return True

    def finished(self) -> None:
        """End the evaluation that was in progress."""
        self._running = False

    def next_deadline(self, version: int) -> float | None:
        """Time at which an evaluation of `version` is due by time, or None."""
        wants = self._enabled and not self._running and version > self._last[0]
        return self._last[1] + self._config.every_seconds if self._config.every_seconds and wants else None


def evaluate(task: Task, data: Any, frame: Frame, device: torch.device) -> Evaluation:
    """Evaluate a version with the task's own `evaluate`; the result's `version` is 0.

    Metrics that are not finite are omitted. An exception of the task becomes `error`.
    """
    try:
        model = task.model()
        frame.write(model)
        metrics = task.evaluate(model.to(device), data)
        finite = {str(k): float(v) for k, v in metrics.items() if math.isfinite(v)}
        return Evaluation(version=0, metrics=finite)
    except (Exception, SystemExit) as error:
        return Evaluation(version=0, metrics={}, error=exception_with_place(error)[:4000])
