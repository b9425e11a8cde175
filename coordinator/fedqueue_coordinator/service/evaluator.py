"""Central evaluation, in a thread beside the merging and on a snapshot: it cannot slow a merge down."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any

import torch

from fedqueue.protocol.messages import Evaluation
from fedqueue.task import Task
from fedqueue.tensors.frame import Frame


def evaluate(task: Task, data: Any, frame: Frame, device: torch.device) -> Evaluation:
    """The task's metrics of a version; non-finite ones are left out, an exception becomes `error`. Version is 0."""
    try:
        model = task.model()
        frame.write(model)
        metrics = task.evaluate(model.to(device), data)
        finite = {str(k): float(v) for k, v in metrics.items() if math.isfinite(v)}
        return Evaluation(version=0, metrics=finite)
    except Exception as error:
        return Evaluation(version=0, metrics={}, error=f"{type(error).__name__}: {error}"[:4000])


class Evaluator:
    """Evaluates one snapshot at a time; `report` is called on its thread with each result."""

    def __init__(self, task: Task, data: Any, device: torch.device, report: Callable[[Evaluation], None]) -> None:
        self._task, self._data, self._device, self._report = task, data, device, report
        self._thread: threading.Thread | None = None
        self.snapshot: tuple[int, Frame] | None = None
        """The version that was evaluated last, and its frame."""

    def start(self, version: int, model: Frame) -> None:
        """Begin to evaluate a copy of `model`; the previous evaluation has been reported."""
        self.join()
        self._thread = threading.Thread(target=self._run, args=(version, model.copy()), name="evaluation")
        self._thread.start()

    def join(self) -> None:
        """Wait until nothing is being evaluated."""
        if self._thread:
            self._thread.join()
            self._thread = None

    def _run(self, version: int, frame: Frame) -> None:
        result = evaluate(self._task, self._data, frame, self._device)
        self.snapshot = (version, frame)
        self._report(result.model_copy(update={"version": version}))
