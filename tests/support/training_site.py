"""A worker's job runner on a sample run, and a task whose training can be checked by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from fedqueue import Client, Progress, Task, TrainResult
from fedqueue.config.compression import CompressionConfig
from fedqueue.config.training import TrainingConfig
from fedqueue.protocol.stream_entry import StreamEntry
from fedqueue_worker.heartbeat import Heartbeat
from fedqueue_worker.job_runner import UNCOMPRESSED, JobRunner
from tests.support.sample_run import SampleRun


class Doubling(Task):
    """Adds 0.25 to every parameter, sets the buffers to 5 and the counters to 9."""

    def __init__(self) -> None:
        self.seen: list[tuple[dict[str, torch.Tensor], Any, TrainingConfig, int]] = []
        self.during: Callable[[Progress], object] = lambda progress: None
        self.metrics: dict[str, float] = {"loss": 0.5}

    def fit(self, model: torch.nn.Module, data: Any, config: TrainingConfig, progress: Progress) -> TrainResult:
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        self.seen.append((state, data, config, torch.initial_seed()))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.25)
            for buffer in model.buffers():
                buffer.fill_(5.0 if buffer.dtype.is_floating_point else 9)
        self.during(progress)
        progress()
        return TrainResult(np.int64(10), self.metrics)  # type: ignore[arg-type] # as a task that counts with numpy


class TrainingSite:
    """The worker of client c0 of a sample run; trains one job at a time in the thread of the test."""

    def __init__(
        self,
        run: SampleRun,
        keep_base: bool = True,
        slowdown: Mapping[str, float] | None = None,
        compression: CompressionConfig = UNCOMPRESSED,
    ) -> None:
        self.run, self.task = run, Doubling()
        self.store = run.join("c0")
        self.ended: list[object] = []
        self.heartbeat = Heartbeat(self.store, ["c0"], 60, 60, self.ended.append)
        self.runner = JobRunner(
            self.store, self.task, run.module, self.heartbeat, 60, keep_base, slowdown or {}, compression=compression
        )
        self.runner.load(Client("c0"), "the rows of c0")
        run.coordinator.receive(0.001)

    def train(self, number: int = 1, **callbacks: Any) -> list[StreamEntry]:
        """Dispatch job `number`, train it, and return the entries that the coordinator receives."""
        self.run.dispatch(number)
        self.commands_sent = self.runner.train(self.run.order(number).model_dump(), **callbacks)
        return self.run.coordinator.receive(0.001)
