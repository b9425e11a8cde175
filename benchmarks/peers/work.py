"""Defines the clients' work in every system under comparison: the same models, data, local training and sleeps.

This module needs only torch and numpy, since it runs in each peer's own environment. A server writes a line for each
merged update to the file that the environment variable PEERS_PROGRESS names: the machine's monotonic clock and, on the
digits, the accuracy of the model after the update.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import torch

ARRAYS = 10
NOISE = 1e-4
DELAYS = (0.05, 0.05, 0.05, 0.05, 0.1, 0.2, 1.0, 2.0)  # seconds that each client sleeps after local training
EPOCHS, LEARNING_RATE, BATCH = 5, 0.3, 32
TARGET = 0.95
STALENESS, ALPHA, BUFFER = 0.5, 0.6, 3  # s(τ) = (1+τ)^−0.5; FedAsync's α; FedBuff's K

torch.set_num_threads(1)


def make_model(nbytes: int, seed: int = 0) -> torch.nn.Module:
    """Make a model of ten equal float32 arrays of `nbytes` in all; if `nbytes` is 0, the MLP for the digits."""
    if nbytes:
        return torch.nn.ParameterList(torch.zeros(max(1, nbytes // 4 // ARRAYS)) for _ in range(ARRAYS))
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))


def train_at_once(model: torch.nn.Module) -> None:
    """Add a little noise to the model, in place of training."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(NOISE)


class Digits:
    """The digits split by the driver, from the file that PEERS_DATA names."""

    def __init__(self, path: str) -> None:
        with np.load(path) as stored:
            self._arrays = {name: torch.from_numpy(stored[name]) for name in stored.files}

    def client(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self._arrays[f"images-{number}"], self._arrays[f"labels-{number}"]

    def accuracy(self, model: torch.nn.Module) -> float:
        """Return the accuracy on the test set, a fifth of all images, on which no client trains."""
        with torch.no_grad():
            guesses = model(self._arrays["images-test"]).argmax(-1)
        return float((guesses == self._arrays["labels-test"]).float().mean())


def train(model: torch.nn.Module, data: tuple[torch.Tensor, torch.Tensor], client: int) -> None:
    """Train locally as one client, and sleep for that client's delay."""
    images, labels = data
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(labels)).split(BATCH):  # type: ignore[no-untyped-call]
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(images[rows]), labels[rows])
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    time.sleep(DELAYS[client])


class Progress:
    """Reports each merged update to the file that PEERS_PROGRESS names."""

    def __init__(self) -> None:
        self._file = Path(os.environ["PEERS_PROGRESS"]).open("a", buffering=1)  # noqa: SIM115 - as long as the process

    def merged(self, accuracy: float | None = None) -> None:
        self._file.write(f"{time.monotonic()} {'' if accuracy is None else accuracy}\n")
