"""A task whose training takes no time, or a given one: it adds a constant to a model of a given size."""

from __future__ import annotations

import time
from typing import Any

import torch

from fedqueue import Client, Progress, Task, TrainResult
from fedqueue.config.training import TrainingConfig

ARRAYS = 10


class InstantTask(Task):
    def __init__(self, nbytes: int, seconds: float = 0.0) -> None:
        """`seconds` is how long a job's training waits."""
        self.seconds = seconds
        self.sizes = [max(1, nbytes // 4 // ARRAYS)] * ARRAYS

    def model(self) -> torch.nn.Module:
        return torch.nn.ParameterList(torch.zeros(size) for size in self.sizes)

    def train_data(self, client: Client) -> Any:
        return [client.id]

    def fit(self, model: torch.nn.Module, data: Any, config: TrainingConfig, progress: Progress) -> TrainResult:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1e-4)
        if self.seconds:
            time.sleep(self.seconds)
        progress()
        return TrainResult(1)
