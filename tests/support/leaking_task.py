"""A task of pictures with classes, whose clients have few rows: what attacks on updates are tried on."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import Dataset, TensorDataset

from fedqueue import Client, Task

FEATURES, CLASSES = 20, 5


class LeakingTask(Task):
    """`test`: whether there are rows that no client trains on; `first`: "linear", "convolution" or "no bias"."""

    def __init__(self, test: bool = True, rows: int = 40, first: str = "linear") -> None:
        self.test, self.rows, self.first = test, rows, first

    def model(self) -> torch.nn.Module:
        if self.first == "convolution":
            return torch.nn.Sequential(
                torch.nn.Unflatten(1, (1, FEATURES)), torch.nn.Conv1d(1, 2, 3), torch.nn.ReLU(), torch.nn.Flatten(),
                torch.nn.Linear(2 * (FEATURES - 2), CLASSES),
            )  # fmt: skip
        first = torch.nn.Linear(FEATURES, 64, bias=self.first == "linear")
        return torch.nn.Sequential(first, torch.nn.ReLU(), torch.nn.Linear(64, CLASSES))

    def train_data(self, client: Client) -> Dataset[Any]:
        return pictures(self.rows, seed=1 + (client.partition or 0), skewed=True)

    def test_data(self) -> Dataset[Any] | None:
        return pictures(600, seed=0, skewed=False) if self.test else None


class WordsTask(LeakingTask):
    """A row is no tensor with a label: the loss reads a mapping."""

    def train_data(self, client: Client) -> Any:
        rows = super().train_data(client)
        return [{"x": rows[i][0], "y": rows[i][1]} for i in range(self.rows)]

    def test_data(self) -> Any:
        return self.train_data(Client("other", 77, 100))

    def loss(self, model: torch.nn.Module, batch: Any) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(model(batch["x"]), batch["y"])


def pictures(count: int, seed: int, skewed: bool) -> TensorDataset:
    """Noise around one mean for each class; with `skewed`, a class c has a share that falls with (c + seed) mod 5."""
    rng = torch.Generator().manual_seed(seed)
    weights = torch.tensor([1.0 + 3.0 * skewed * ((c + seed) % CLASSES) for c in range(CLASSES)])
    labels = torch.multinomial(weights, count, replacement=True, generator=rng)
    means = torch.rand(CLASSES, FEATURES, generator=torch.Generator().manual_seed(99))
    return TensorDataset(means[labels] + 0.7 * torch.randn(count, FEATURES, generator=rng), labels)
