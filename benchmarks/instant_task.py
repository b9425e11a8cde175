"""A task whose training takes no time: it adds a constant to a model of a given size."""

from __future__ import annotations

from typing import Any

import torch

from fedqueue import Client, Progress, Task, TrainResult
from fedqueue.config.training import TrainingConfig

ARRAYS = 10


class InstantTask(Task):
    def __init__(self, nbytes: int) -> None:
        self.sizes = [max(1, nbytes // 4 // ARRAYS)] * ARRAYS

    def model(self) -> torch.nn.Module:
        return torch.nn.ParameterList(torch.zeros(size) for size in self.sizes)

    def train_data(self, client: Client) -> Any:
        return [client.id]

    def fit(self, model: torch.nn.Module, data: Any, config: TrainingConfig, progress: Progress) -> TrainResult:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1e-4)
        progress()
        return TrainResult(1)
