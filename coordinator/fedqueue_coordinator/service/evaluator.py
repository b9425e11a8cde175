"""Runs the central evaluation in a thread, on a copy of the model, so that it does not delay merging."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

from fedqueue.protocol.messages import Evaluation
from fedqueue.task import Task
from fedqueue.tensors.frame import Frame
from fedqueue_coordinator.core.evaluation import evaluate, failed_evaluation


class Evaluator:
    """Evaluates one version at a time; `report` is called on its thread with each result."""

    def __init__(
        self, task: Task, data: Any, device: torch.device, report: Callable[[Evaluation], None], seed: int = 0
    ) -> None:
        """`seed` is the run's."""
        self._seed = seed
        self._task, self._data, self._device, self._report = task, data, device, report
        self._thread: threading.Thread | None = None
        self.snapshot: tuple[int, Frame] | None = None
        """The version that was evaluated last without a failure, and its frame."""

    def start(self, version: int, model: Frame) -> None:
        """Evaluate a copy of `model`, after the previous evaluation has been reported."""
        self.join()
        self._thread = threading.Thread(target=self._run, args=(version, model.copy()), name="evaluation")
        self._thread.start()

    def join(self) -> None:
        """Wait until the evaluation in progress has been reported."""
        if self._thread:
            self._thread.join()
            self._thread = None

    def _run(self, version: int, frame: Frame) -> None:
        try:
            result = evaluate(self._task, self._data, frame, self._device, self._seed)
        except KeyboardInterrupt as error:  # raised by the task: only the main thread gets the user's
            result = failed_evaluation(error)
        if not result.error:
            self.snapshot = (version, frame)
        self._report(result.model_copy(update={"version": version}))
