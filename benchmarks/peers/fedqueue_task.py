"""The work of `work.py` as a fedqueue task."""

from __future__ import annotations

from typing import Any

import torch
import work

from fedqueue import Client, Progress, Task, TrainResult
from fedqueue.config.training import TrainingConfig


class PeerTask(Task):
    def __init__(self, nbytes: int, seed: int, data: str) -> None:
        self.nbytes, self.seed = nbytes, seed
        self.digits = work.Digits(data) if data else None

    def model(self) -> torch.nn.Module:
        model: torch.nn.Module = work.make_model(self.nbytes, self.seed)
        return model

    def train_data(self, client: Client) -> Any:
        assert client.partition is not None
        self.number = client.partition
        return self.digits.client(client.partition) if self.digits else ([0], [0])

    def test_data(self) -> Any:
        return self.digits

    def num_examples(self, data: Any) -> int:
        return len(data[1])

    def evaluate(self, model: torch.nn.Module, data: Any) -> dict[str, float]:
        return {"accuracy": data.accuracy(model)}

    def fit(self, model: torch.nn.Module, data: Any, config: TrainingConfig, progress: Progress) -> TrainResult:
        if self.digits:
            work.train(model, data, self.number)
        else:
            work.train_at_once(model)
        progress()
        return TrainResult(len(data[1]))
