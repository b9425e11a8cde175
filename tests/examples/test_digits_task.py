"""The digits example has real images, a separate test split, and models that learn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from fedqueue import Client
from fedqueue.config.loading import load_config
from fedqueue.config.training import TrainingConfig
from fedqueue.errors import TaskError
from fedqueue.partition import split
from fedqueue.task import load_task
from fedqueue.training import train

FOLDER = Path(__file__).parents[2] / "examples" / "digits"
CLIENTS = [Client(f"client-{i}", i, 8) for i in range(8)]


def digits_task(**options: Any) -> Any:
    return load_task("task.py:DigitsTask", options, FOLDER)


def as_rows(*datasets: Any) -> list[bytes]:
    """Return each example (image and label) as one comparable value, sorted."""
    return sorted(
        image.numpy().tobytes() + bytes([int(label)])
        for data in datasets
        for image, label in zip(*data.tensors, strict=True)
    )


def test_federation_file_is_valid_and_names_this_task() -> None:
    config = load_config(FOLDER / "federation.toml", environment={})
    task = load_task(config.task.entrypoint, config.task.options, FOLDER)
    assert len(config.clients.ids) == 8
    assert config.stop.target == {"accuracy": 0.95}
    assert all(len(task.train_data(config.clients.client(name))) for name in config.clients.ids)


def test_images_are_those_of_scikit_learn() -> None:
    pixels, digits = load_digits(return_X_y=True)
    task = digits_task()
    theirs = sorted(
        image.tobytes() + bytes([digit]) for image, digit in zip((pixels / 16).astype(np.float32), digits, strict=True)
    )
    assert as_rows(task.test_data(), *map(task.train_data, CLIENTS)) == theirs


def test_images_are_float32_between_0_and_1_and_labels_int64() -> None:
    task = digits_task()
    for images, labels in (task.test_data().tensors, task.train_data(CLIENTS[0]).tensors):
        assert images.dtype == torch.float32
        assert images.shape == (len(labels), 64)
        assert (images.min(), images.max()) == (0.0, 1.0)
        assert labels.dtype == torch.int64


@pytest.mark.parametrize("scheme", ["dirichlet", "iid", "shards", "quantity"])
def test_train_and_test_images_are_disjoint(scheme: str) -> None:
    task = digits_task(scheme=scheme, seed=3)
    train_images, labels = task._images[0]
    shares = split(scheme, labels.numpy(), 8, 0.3, 3)
    for client, share in zip(CLIENTS, shares, strict=True):
        assert torch.equal(task.train_data(client).tensors[0], train_images[share])
    all_images = as_rows(digits_task(scheme="iid").test_data(), *map(digits_task(scheme="iid").train_data, CLIENTS))
    assert as_rows(task.test_data(), *map(task.train_data, CLIENTS)) == all_images


def test_a_fifth_of_each_class_is_for_testing() -> None:
    labels = digits_task().test_data().tensors[1]
    of_all = np.bincount(load_digits().target)
    assert len(labels) == 360
    assert np.abs(np.bincount(labels) - of_all / 5).max() <= 1


def test_seed_determines_the_split() -> None:
    first, again, other = digits_task(), digits_task(), digits_task(seed=1)
    assert torch.equal(first.test_data().tensors[0], again.test_data().tensors[0])
    assert torch.equal(first.train_data(CLIENTS[2]).tensors[0], again.train_data(CLIENTS[2]).tensors[0])
    assert as_rows(first.test_data()) != as_rows(other.test_data())


@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_both_models_score_ten_digits_for_a_batch_of_any_size(model: str) -> None:
    network = digits_task(model=model).model()
    for size in (1, 5):
        assert network(torch.rand(size, 64)).shape == (size, 10)


def test_cnn_carries_running_statistics_and_mlp_none() -> None:
    assert "running_var" in str(digits_task(model="cnn").model().state_dict().keys())
    assert not list(digits_task(model="mlp").model().buffers())


@pytest.mark.parametrize(("model", "learning_rate"), [("mlp", 0.3), ("cnn", 0.1)])
def test_both_models_learn_from_one_clients_images(model: str, learning_rate: float) -> None:
    task = digits_task(model=model, scheme="iid")
    torch.manual_seed(0)
    network = task.model()
    before = task.evaluate(network, task.test_data())
    config = TrainingConfig(learning_rate=learning_rate, local_epochs=10, device="cpu")
    fit = train(task, network, task.train_data(CLIENTS[0]), config, lambda: None)
    after = task.evaluate(network, task.test_data())
    assert fit.num_examples == 180
    assert after["loss"] < before["loss"]
    assert after["accuracy"] > 0.7 > before["accuracy"]


def test_client_without_a_partition_is_an_error() -> None:
    with pytest.raises(TaskError, match="visitor is not one of the run's partitions"):
        digits_task().train_data(Client("visitor"))


def test_unknown_model_names_those_there_are() -> None:
    with pytest.raises(TaskError, match="unknown model 'resnet'; known: mlp, cnn"):
        digits_task(model="resnet")
