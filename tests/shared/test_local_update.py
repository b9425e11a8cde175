"""One job outside a worker: what `fit` is told, what it may return, seeds, and progress without `progress()`."""

from __future__ import annotations

import random
import threading
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import IterableDataset, TensorDataset

from fedqueue import Client, Manifest, Progress, Task, TrainingConfig, TrainResult
from fedqueue.errors import JobClosed, NoExamples, TaskError
from fedqueue.local_model import LocalModel
from fedqueue.local_update import compute_update, load_data
from fedqueue.protocol.messages import Order
from fedqueue.tensors.frame import Frame

NORTH = Client("north", 1, 3)


class Own(Task):
    """A task whose `fit` is given by the test."""

    def __init__(self, fit: Any, rows: int = 8) -> None:
        self._fit, self.rows = fit, rows

    def fit(self, model: Any, data: Any, config: Any, progress: Any) -> Any:
        return self._fit(model, progress)

    def train_data(self, client: Any) -> TensorDataset:
        return TensorDataset(torch.zeros(self.rows, 2))


def job(task: Any, report: Any = lambda: None, version: int = 5, seed: int = 3, module: Any = None) -> tuple[Any, ...]:
    """Train one job of client north; return its update's header and its progress."""
    module = module or torch.nn.Linear(2, 1)
    manifest = Manifest.from_module(module)
    model = LocalModel(task, module, manifest)
    order = Order(run="r", job="r-1", client="north", seed=seed, training=TrainingConfig(device="cpu"))
    progress = model.progress(NORTH, version, report)
    data = task.train_data(NORTH)
    return compute_update(task, model, data, order, Frame(manifest), Frame(manifest), progress), progress


def steps(count: Any, optimizer: Any = torch.optim.SGD, **options: Any) -> Any:
    def fit(model: Any, progress: Any) -> TrainResult:
        made = optimizer(model.parameters(), lr=0.1, **options)
        for _ in range(count):

            def closure() -> Any:
                made.zero_grad()
                loss = model(torch.ones(1, 2)).sum()
                loss.backward()
                return loss

            made.step(closure)
        return TrainResult(8)

    return fit


def test_fit_is_told_the_client_and_the_base_version() -> None:
    told = []

    def fit(model: Any, progress: Progress) -> int:
        told.append((progress.client, progress.version))
        return 8

    job(Own(fit), version=41)
    assert told == [(NORTH, 41)]


# Progress by the optimizer's steps


@pytest.mark.parametrize(
    ("optimizer", "options"), [(torch.optim.SGD, {}), (torch.optim.Adam, {}), (torch.optim.LBFGS, {"max_iter": 2})]
)
def test_each_step_of_an_optimizer_is_progress(optimizer: Any, options: dict[str, Any]) -> None:
    reports = []
    _, progress = job(Own(steps(3, optimizer, **options)), lambda: reports.append(1))
    assert (len(reports), progress.batches) == (3, 3)


def test_batches_are_the_calls_where_fit_makes_any() -> None:
    def fit(model: Any, progress: Any) -> int:
        steps(4)(model, progress)
        progress()
        return 8

    assert job(Own(fit))[1].batches == 1


def test_closed_job_ends_at_the_next_step() -> None:
    reports = []

    def report() -> None:
        reports.append(1)
        if len(reports) == 2:
            raise JobClosed("lost")

    with pytest.raises(JobClosed):
        job(Own(steps(5)), report)
    assert len(reports) == 2


def test_no_step_is_reported_after_the_job() -> None:
    reports = []
    job(Own(steps(1)), lambda: reports.append(1))
    steps(2)(torch.nn.Linear(2, 1), None)
    with pytest.raises(TaskError):
        job(Own(lambda model, progress: None), lambda: reports.append(1))
    steps(2)(torch.nn.Linear(2, 1), None)
    assert len(reports) == 1


def test_step_in_another_thread_is_progress_and_cannot_end_it() -> None:
    reports, errors = [], []

    def report() -> None:
        reports.append(1)
        raise JobClosed("lost")

    def fit(model: Any, progress: Any) -> int:
        def work() -> None:
            try:
                steps(3)(model, progress)
            except JobClosed as error:
                errors.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        return 8

    job(Own(fit), report)
    assert (len(reports), errors) == (3, [])


# What fit returns


def counted(number: Any) -> TrainResult:
    """Return what a task returns that counts its examples in any type of number."""
    return TrainResult(number)


@pytest.mark.parametrize("returned", [8, np.int64(8), TrainResult(8), counted(np.int32(8))])
def test_number_of_examples_alone_is_accepted(returned: Any) -> None:
    assert job(Own(lambda model, progress: returned))[0].examples == 8


@pytest.mark.parametrize(
    ("returned", "says"),
    [
        (None, r"^Own\.fit returned None: return fedqueue\.TrainResult\(num_examples=\.\.\., metrics="),
        ((8, {}), r"^Own\.fit returned a tuple: return fedqueue\.TrainResult"),
        ({"loss": 1.0}, r"^Own\.fit returned a dict: "),
        (True, r"^Own\.fit returned a bool: "),
        (counted(2.5), r"num_examples = 2\.5: an integer from 0 on"),
        (TrainResult(-1), "num_examples = -1"),
        (TrainResult(24), r"returned more num_examples than the client has: count each example once"),
    ],
)
def test_other_result_of_fit_is_an_error_with_the_remedy(returned: Any, says: str) -> None:
    with pytest.raises(TaskError, match=says):
        job(Own(lambda model, progress: returned))


# Seeds


def draws() -> tuple[Any, ...]:
    return random.random(), np.random.random(), torch.rand(1).item()


def test_every_global_generator_follows_the_orders_seed() -> None:
    seen = []

    def fit(model: Any, progress: Any) -> int:
        seen.append(draws())
        return 8

    task = Own(fit)
    for seed in (3, 4, 3):
        job(task, seed=seed)
        draws()
    assert seen[0] == seen[2]
    assert all(a != b for a, b in zip(seen[0], seen[1], strict=True))


def test_random_data_differs_by_client_and_is_the_same_again() -> None:
    class Drawn(Task):
        def train_data(self, client: Any) -> list[Any]:
            return [draws()]

    def data(client: Any, seed: int = 7) -> Any:
        return load_data(Drawn(), Client(client), seed)[0]

    assert data("a") == data("a")
    assert data("a") != data("b")
    assert data("a") != data("a", seed=8)


# The number of examples


def test_client_without_rows_takes_no_part() -> None:
    with pytest.raises(NoExamples, match=r"^north has no examples: it does not take part$"):
        load_data(Own(None, rows=0), NORTH, 0)


def test_stream_has_no_known_number_of_examples() -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter(())

    class Streamed(Task):
        def train_data(self, client: Any) -> Any:
            return Stream()

    assert load_data(Streamed(), NORTH, 0)[1] is None


def test_progress_of_ones_own_has_a_client_and_a_version() -> None:
    progress = Progress()
    progress()
    assert (progress.client.id, progress.version, progress.batches) == ("client-0", 0, 1)
