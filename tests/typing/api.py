"""Uses the public names as a user's code does; mypy checks it, nothing runs it."""

from __future__ import annotations

import torch
from torch.utils.data import Dataset, TensorDataset

from fedqueue import Client, FedqueueError, Progress, Task, TrainResult, partition
from fedqueue.config.training import TrainingConfig

Rows = Dataset[tuple[torch.Tensor, ...]]


class LinearTask(Task):
    """Options of the constructor come from `[task.options]`."""

    def __init__(self, features: int = 3) -> None:
        self.features = features

    def model(self) -> torch.nn.Module:
        return torch.nn.Linear(self.features, 1)

    def train_data(self, client: Client) -> Rows:
        name: str = client.id
        number: int | None = client.partition
        if number is None:
            raise ValueError(f"client {name} has no partition")
        return TensorDataset(torch.zeros(8, self.features), torch.zeros(8, 1))

    def fit(self, model: torch.nn.Module, data: Rows, config: TrainingConfig, progress: Progress) -> TrainResult:
        progress()
        result = super().fit(model, data, config, progress)
        metrics: dict[str, float] = dict(result.metrics)
        return TrainResult(num_examples=result.num_examples, metrics=metrics)


def describe(error: FedqueueError) -> str:
    """Every error of the package is one class."""
    return str(error)


def sizes(labels: list[int]) -> list[int]:
    """How many examples each of two clients gets."""
    return [len(indices) for indices in partition.dirichlet(labels, clients=2, alpha=0.5, seed=1)]


task: Task = LinearTask(features=4)
