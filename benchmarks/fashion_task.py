"""Fashion-MNIST from Debian's package `dataset-fashion-mnist`: 60,000 images of 28x28 pixels, spread over clients."""

from __future__ import annotations

import gzip
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import TensorDataset

from fedqueue import Client, Task
from fedqueue.errors import TaskError
from fedqueue.partition import split

FOLDER = Path("/usr/share/datasets/fashion-mnist")
HEADER_BYTES = {"images": 16, "labels": 8}


class FashionTask(Task):
    """Classify a piece of clothing with a small network (784-32-10). alpha: of the Dirichlet split over clients."""

    def __init__(self, alpha: float = 1.0, seed: int = 0) -> None:
        self.alpha, self.seed = alpha, seed

    def model(self) -> torch.nn.Module:
        """Maps images, float32 (n, 784), to scores of the ten classes, float32 (n, 10)."""
        return torch.nn.Sequential(torch.nn.Linear(784, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))

    def train_data(self, client: Client) -> TensorDataset:
        """The client's share of the training images in [0, 1], and their labels."""
        images, labels = self._training
        assert client.partition is not None
        assert client.partitions is not None
        shares = split("dirichlet", labels.numpy(), client.partitions, self.alpha, self.seed)
        mine = torch.from_numpy(shares[client.partition])
        return TensorDataset(images[mine], labels[mine])

    def test_data(self) -> TensorDataset:
        """The 10,000 images that no client trains on."""
        return TensorDataset(*_read("t10k"))

    @cached_property
    def _training(self) -> tuple[torch.Tensor, torch.Tensor]:
        return _read("train")


def is_installed() -> bool:
    """Whether the package's files are on this machine."""
    return (FOLDER / "train-images-idx3-ubyte.gz").exists()


def _read(part: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Images, float32 (n, 784) in [0, 1], and labels, int64 (n,)."""
    return _bytes(part, "images", 3).reshape(-1, 784).float() / 255, _bytes(part, "labels", 1).long()


def _bytes(part: str, what: str, dimensions: int) -> torch.Tensor:
    path = FOLDER / f"{part}-{what}-idx{dimensions}-ubyte.gz"
    if not path.exists():
        raise TaskError(f"{path} is missing: install Debian's package dataset-fashion-mnist")
    content = gzip.decompress(path.read_bytes())[HEADER_BYTES[what] :]
    return torch.from_numpy(np.frombuffer(content, np.uint8).copy())
