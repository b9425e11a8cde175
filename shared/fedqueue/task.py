"""The class that a user of fedqueue subclasses, `Task`, and how a configuration's entry point is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from fedqueue.config.client import Client
from fedqueue.config.entrypoint import import_entrypoint
from fedqueue.errors import TaskError
from fedqueue.exception_text import exception_text, exception_with_place

if TYPE_CHECKING:
    import torch

    from fedqueue.config.training import TrainingConfig

__all__ = ["Client", "Progress", "Task", "TrainResult", "construct_task", "load_task", "make_model"]


class Progress(Protocol):
    """What `Task.fit` calls after each batch: it renews the job's lease.

    Raises JobClosed when the update is no longer wanted. `fit` lets the error pass, and the worker drops the job.

    >>> from fedqueue import Progress
    >>> def train(batches: list[int], progress: Progress) -> int:
    ...     for batch in batches:
    ...         progress()
    ...     return len(batches)
    >>> train([1, 2, 3], progress=lambda: None)
    3
    """

    def __call__(self) -> None: ...


@dataclass(frozen=True)
class TrainResult:
    """What one local training reports beside the model: counts and averages, no rows of data.

    >>> from fedqueue import TrainResult
    >>> TrainResult(num_examples=64, metrics={"loss": 0.31}).num_examples
    64
    """

    num_examples: int
    """Examples trained on: the update's weight in an algorithm that weights by examples."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Averages over the training, by name. They leave the site with the update."""


class Task:
    """One learning problem: a model, each client's data, and how to measure.

    Subclass it and define `model` and `train_data`. The other methods have defaults for classification. The keyword
    arguments of the constructor are `[task.options]` of the configuration. The same class runs on both sides: the
    coordinator calls `model`, `test_data` and `evaluate`; a worker calls `model`, `train_data`, `num_examples` and
    `fit`, which calls `loss`. Training data is loaded on workers only.

    >>> import torch
    >>> from fedqueue import Client, Task, TrainingConfig
    >>> class Sign(Task):
    ...     def model(self):
    ...         return torch.nn.Linear(1, 2)
    ...     def train_data(self, client):
    ...         inputs = torch.randn(40, 1)
    ...         return torch.utils.data.TensorDataset(inputs, (inputs[:, 0] > 0).long())
    >>> task = Sign()
    >>> data = task.train_data(Client("client-0", partition=0, partitions=4))
    >>> task.fit(task.model(), data, TrainingConfig(device="cpu"), progress=lambda: None).num_examples
    40
    """

    def model(self) -> torch.nn.Module:
        """Return a newly initialised model. The run's seed is set before the call."""
        raise NotImplementedError(f"{type(self).__name__} must define model(self) -> torch.nn.Module")

    def train_data(self, client: Client) -> Any:
        """Return the client's own examples as a `torch.utils.data.Dataset`. Called once, on the client's worker."""
        raise NotImplementedError(f"{type(self).__name__} must define train_data(self, client) -> Dataset")

    def test_data(self) -> Any:
        """Return the coordinator's held-out examples as a `Dataset`, or None for no central evaluation."""
        return None

    def loss(self, model: torch.nn.Module, batch: Any) -> torch.Tensor:
        """Return the loss of one batch, a scalar tensor. The default is the mean cross entropy of (inputs, labels)."""
        import torch

        inputs, labels = batch
        return torch.nn.functional.cross_entropy(model(inputs), labels)

    def evaluate(self, model: torch.nn.Module, data: Any) -> dict[str, float]:
        """Return metrics of `model` on `data`, what `test_data` returned. The default is mean `loss` and `accuracy`.

        The default expects (inputs, labels) batches, and scores of shape (n, classes) from the model. Raises TaskError
        for data without examples.
        """
        import torch

        batches = torch.utils.data.DataLoader(data, batch_size=512)
        device = next(model.parameters()).device
        loss = correct = seen = 0.0
        model.eval()
        with torch.no_grad():
            for inputs, labels in batches:
                batch = inputs.to(device), labels.to(device)
                loss += float(self.loss(model, batch)) * len(labels)
                correct += float((model(batch[0]).argmax(-1) == batch[1]).sum())
                seen += len(labels)
        if not seen:
            raise TaskError("test_data() is empty: return None where there is nothing to evaluate on")
        return {"loss": loss / seen, "accuracy": correct / seen}

    def fit(self, model: torch.nn.Module, data: Any, config: TrainingConfig, progress: Progress) -> TrainResult:
        """Train `model` in place on `data`, what `train_data` returned. The default trains as `[training]` says.

        An override calls `progress()` after each batch and returns how many examples it trained on.
        """
        from fedqueue.training import train

        return train(self, model, data, config, progress)

    def num_examples(self, data: Any) -> int:
        """Return the number of examples in `data`: the client's weight in an algorithm that weights by examples.

        Raises TaskError for data without a length.
        """
        if isinstance(data, Sized):
            return len(data)
        raise TaskError(f"{type(data).__name__} has no len(): override Task.num_examples(self, data) to count it")


def load_task(entrypoint: str, options: Mapping[str, Any], folder: Path) -> Task:
    """Construct the task of `entrypoint`: `path/to/file.py:Class`, relative to `folder`, or `package.module:Class`.

    Raises TaskError, which says what is missing. An exception of the user's module or constructor is its cause.
    """
    where, colon, name = entrypoint.rpartition(":")
    if not colon or not where or not name.isidentifier():
        raise TaskError(f"task.entrypoint = {entrypoint!r}: expected path/to/task.py:Class or package.module:Class")
    module, _ = import_entrypoint(entrypoint, folder, "task.entrypoint")
    cls = getattr(module, name, None)
    if not (isinstance(cls, type) and issubclass(cls, Task)):
        tasks = [n for n, v in vars(module).items() if isinstance(v, type) and issubclass(v, Task) and v is not Task]
        raise TaskError(f"{where} has no Task named {name!r}; it has: {', '.join(tasks) or 'none'}")
    return construct_task(cls, options)


def construct_task(cls: type[Task], options: Mapping[str, Any]) -> Task:
    """Return `cls(**options)`. Raises TaskError if the constructor raises; that exception is its cause."""
    try:
        return cls(**options)
    except (Exception, SystemExit) as error:
        problem = exception_text(error)
        raise TaskError(f"{cls.__name__}(**task.options) with {dict(options)}: {problem}") from error


def make_model(task: Task) -> torch.nn.Module:
    """Return `task.model()`. Raises TaskError for whatever the method raises, which is its cause.

    The caller handles SIGINT, so that a KeyboardInterrupt here is the task's own.
    """
    try:
        return task.model()
    except BaseException as error:
        raise TaskError(f"{type(task).__name__}.model(): {exception_with_place(error)}") from error
