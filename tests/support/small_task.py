"""A task with a model of one linear layer, for tests whose clients follow a script and do not train."""

from __future__ import annotations

from typing import Any

import torch

from fedqueue import Client, Task


class SmallTask(Task):
    """Has 3 inputs and 2 outputs; with `batch_norm`, the model also has buffers and a counter."""

    def __init__(self, batch_norm: bool = True) -> None:
        self._batch_norm = batch_norm

    def model(self) -> torch.nn.Module:
        linear = torch.nn.Linear(3, 2)
        return torch.nn.Sequential(linear, torch.nn.BatchNorm1d(2)) if self._batch_norm else linear

    def train_data(self, client: Client) -> Any:
        raise AssertionError("clients of this task follow a script")
