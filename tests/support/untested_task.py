"""A task that gives the coordinator no test data, so no version is evaluated."""

from __future__ import annotations

import torch

from fedqueue import Task


class UntestedTask(Task):
    def model(self) -> torch.nn.Module:
        return torch.nn.Linear(2, 2)
