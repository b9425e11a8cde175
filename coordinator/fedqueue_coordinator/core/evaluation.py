"""Central evaluation: which versions are evaluated, and the evaluation of one version."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from fedqueue.config.schema import EvaluationConfig
from fedqueue.errors import ConfigurationError, TaskError
from fedqueue.evaluation import eval_mode
from fedqueue.exception_text import exception_with_place, one_line
from fedqueue.metrics import as_metrics
from fedqueue.protocol.messages import Evaluation
from fedqueue.task import Task
from fedqueue.tensors.frame import Frame
from fedqueue.training import set_seed

MAX_FAILED_EVALUATIONS = 5
"""Evaluations that fail in a row before the run ends."""
FIRST_PAUSE_SECONDS = 5.0
"""Pause after an evaluation that failed; each further failure in a row doubles it."""

MAX_ERROR = 1000
"""Characters of the description of an evaluation's failure."""
RESERVED = {"version", "seconds"}
"""Names that the history has for an evaluation's version and time."""


class EvaluationSchedule:
    """Chooses versions by their number and by time; at most one evaluation is in progress."""

    def __init__(self, config: EvaluationConfig, enabled: bool) -> None:
        """`enabled` is false if the task has no test data."""
        self._config, self._enabled = config, enabled
        self._running = False
        self._last = (-1, 0.0)  # version, time
        self._pause_ends = 0.0
        self.failed = 0
        """Evaluations that failed in a row."""

    def begin_if_due(self, version: int, now: float) -> bool:
        """Whether `version` must be evaluated now; if so, its evaluation is in progress until `finished`."""
        last, at = self._last
        every_seconds = self._config.every_seconds
        due = self._due_by_version(version) or (every_seconds and version > last and now >= at + every_seconds)
        if not (due and self._enabled) or self._running or now < self._pause_ends:
            return False
        self._running = True
        self._last = (version, now)
        return True

    def finished(self, failed: bool, now: float) -> None:
        """End the evaluation that was in progress; after a failure the next one waits."""
        self._running = False
        self.failed = self.failed + 1 if failed else 0
        self._pause_ends = now + FIRST_PAUSE_SECONDS * 2 ** (self.failed - 1) if failed else 0.0

    def next_deadline(self, version: int) -> float | None:
        """Time at which an evaluation of `version` is due by time or after a pause, or None."""
        last, at = self._last
        if not self._enabled or self._running or version <= last:
            return None
        ends = [at + self._config.every_seconds] if self._config.every_seconds else []
        if self.failed and self._due_by_version(version):
            ends.append(self._pause_ends)
        return max(min(ends), self._pause_ends) if ends else None

    def _due_by_version(self, version: int) -> bool:
        last, every = self._last[0], self._config.every_versions
        return bool(every and (last < 0 or version >= last + every))


def load_test_data(task: Task) -> Any:
    """Return what `task.test_data` returns, None where the run has no central evaluation; raises TaskError."""
    try:
        return task.test_data()
    except (Exception, SystemExit) as error:
        raise TaskError(f"test_data() raised {one_line(exception_with_place(error), MAX_ERROR)}") from error


def require_test_data(target: Iterable[str], data: Any) -> None:
    """Raise ConfigurationError for the metrics of a target if `data`, what `test_data` returned, is None."""
    if data is None and (metrics := ", ".join(target)):
        problem = f"nothing measures {metrics}: the task's test_data() returned None"
        hint = "let test_data() return the operator's test data, or set another limit in [stop] instead"
        raise ConfigurationError("stop.target", None, problem, hint)


def evaluate(task: Task, data: Any, frame: Frame, device: torch.device, seed: int = 0) -> Evaluation:
    """Evaluate a version with the task's own `evaluate`, in eval mode and without gradients.

    `seed` is the run's, so that what the model draws beside the frame is what workers have. The `version` of the result
    is 0. An exception of the task becomes `error`, except KeyboardInterrupt, which is the user's own on a main thread.
    """
    try:
        set_seed(seed)
        model = task.model()
        frame.write(model)
        model.to(device)
        with eval_mode(model):
            metrics = as_metrics(task.evaluate(model, data), "evaluate")
        if taken := RESERVED & metrics.keys():
            raise TaskError(f"evaluate returned the metric {min(taken)!r}, which names the evaluation's own field")
        return Evaluation(version=0, metrics=metrics)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        return failed_evaluation(error)


def failed_evaluation(error: BaseException) -> Evaluation:
    """Return the result of an evaluation that raised `error`; its `version` is 0."""
    return Evaluation(version=0, metrics={}, error=one_line(exception_with_place(error), MAX_ERROR))
