"""A task for whole runs: a small separable problem, with options that make a client misbehave."""

import time
from typing import Any

import torch
from torch.utils.data import Dataset, TensorDataset

from fedqueue import Client, Progress, Task, TrainResult
from fedqueue.config.training import TrainingConfig


class ToyTask(Task):
    """`raises`: id of the client whose training raises, or `*` for all; `batch_seconds`: duration of a batch.

    With `buffers` false, the model has GroupNorm in place of BatchNorm, and so no running statistics.
    """

    def __init__(self, raises: str = "", batch_seconds: float = 0.0, buffers: bool = True) -> None:
        self.raises, self.batch_seconds, self.buffers = raises, batch_seconds, buffers

    def model(self) -> torch.nn.Module:
        norm = torch.nn.BatchNorm1d(8) if self.buffers else torch.nn.GroupNorm(2, 8)
        return torch.nn.Sequential(torch.nn.Linear(4, 8), norm, torch.nn.ReLU(), torch.nn.Linear(8, 2))

    def train_data(self, client: Client) -> Dataset[Any]:
        self._client = client.id
        return points(96, seed=1 + (client.partition or 0))

    def test_data(self) -> Dataset[Any]:
        return points(500, seed=0)

    def loss(self, model: torch.nn.Module, batch: Any) -> torch.Tensor:
        time.sleep(self.batch_seconds if model.training else 0.0)
        return super().loss(model, batch)

    def fit(self, model: torch.nn.Module, data: Any, config: TrainingConfig, progress: Progress) -> TrainResult:
        if self.raises and self.raises in (self._client, "*"):
            raise RuntimeError("the scanner is on fire")
        return super().fit(model, data, config, progress)


def points(examples: int, seed: int) -> TensorDataset:
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(examples, 4, generator=rng)
    return TensorDataset(x, (x[:, 0] + x[:, 1] > 0).long())
