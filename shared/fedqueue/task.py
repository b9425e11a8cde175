"""The class that a user of fedqueue subclasses, `Task`, and how a configuration's entry point is loaded."""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedqueue.config.client import Client
from fedqueue.config.entrypoint import import_entrypoint
from fedqueue.errors import TaskError
from fedqueue.exception_text import exception_text, exception_with_place

if TYPE_CHECKING:
    import torch

    from fedqueue.config.schema import Config
    from fedqueue.config.training import TrainingConfig
    from fedqueue.private_training import PrivateJob
    from fedqueue.statistics.pooled import Statistics

DEFAULT_CLIENT = Client("client-0")

__all__ = ["Client", "Progress", "Task", "TrainResult", "construct_task", "load_task", "make_model", "prepare_task"]


class Progress:
    """What `Task.fit` is told about its job, and what it calls after each batch, which renews the job's lease.

    A call raises JobClosed when the update is no longer wanted. `fit` lets the error pass, and the worker drops the
    job. Each step of a torch optimizer renews the lease too.

    >>> from fedqueue import Progress
    >>> def train(batches: list[int], progress: Progress) -> int:
    ...     for batch in batches:
    ...         progress()
    ...     return len(batches)
    >>> train([1, 2, 3], Progress())
    3
    """

    def __init__(
        self,
        report: Callable[[], None] = lambda: None,
        client: Client = DEFAULT_CLIENT,
        version: int = 0,
        memory: dict[str, Any] | None = None,
    ) -> None:
        """`report` is called by each call and each step. Without arguments, for tests of a `fit` of your own."""
        self._report = report
        self.client = client
        """The client that the job trains for."""
        self.version = version
        """The base version: the version of the model that the job trains from."""
        self.memory: dict[str, Any] = {} if memory is None else memory
        """The client's own, from job to job, in the memory of its worker process. A restart of the process empties it,
        and so does a move of the client to another process. Its content never leaves the site by itself."""
        self.private: PrivateJob | None = None
        """What protects the rows in this job, with `[privacy.examples]`; the default `fit` obeys it."""
        self._calls = self._steps = 0

    def __call__(self) -> None:
        self._calls += 1
        self._report()

    def stepped(self) -> None:
        """Report a step of an optimizer. The worker calls this itself after each step of a torch optimizer."""
        self._steps += 1
        self._report()

    @property
    def batches(self) -> int:
        """The batches that the job has trained on: the calls, or the optimizer's steps where there was no call."""
        return self._calls or self._steps


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
    >>> from fedqueue import Client, Progress, Task, TrainingConfig
    >>> class Sign(Task):
    ...     def model(self):
    ...         return torch.nn.Linear(1, 2)
    ...     def train_data(self, client):
    ...         inputs = torch.randn(40, 1)
    ...         return torch.utils.data.TensorDataset(inputs, (inputs[:, 0] > 0).long())
    >>> task = Sign()
    >>> data = task.train_data(Client("client-0", partition=0, partitions=4))
    >>> task.fit(task.model(), data, TrainingConfig(device="cpu"), progress=Progress()).num_examples
    40
    """

    stateful_clients: bool = False
    """Whether each client keeps from job to job what the model contains beside its parameters and persistent buffers,
    such as a hidden state. `False`: each job finds the model as `model` returned it."""

    def model(self) -> torch.nn.Module:
        """Return a newly initialised model. The run's seed is set before the call."""
        raise NotImplementedError(f"{type(self).__name__} must define model(self) -> torch.nn.Module")

    def train_data(self, client: Client) -> Any:
        """Return the client's own examples. Called once, on the client's worker.

        The default `fit` takes a `torch.utils.data.Dataset`, map-style or iterable, or a `DataLoader`. The global
        random generators are seeded for the client before the call. A client without examples takes no part.
        """
        raise NotImplementedError(f"{type(self).__name__} must define train_data(self, client) -> Dataset")

    def test_data(self) -> Any:
        """Return the coordinator's held-out examples, or None for no central evaluation.

        The default `evaluate` takes a `Dataset` or a `DataLoader`.
        """
        return None

    def collate_fn(self, examples: list[Any]) -> Any:
        """Return one batch, made of a list of examples of a dataset. The default is torch's `default_collate`.

        Override it, or assign a function to `self.collate_fn`, for examples of different lengths. Data that is a
        `DataLoader` has its own.
        """
        import torch

        return torch.utils.data.default_collate(examples)

    def loss(self, model: torch.nn.Module, batch: Any) -> torch.Tensor:
        """Return the loss of one batch, a scalar tensor. The default is the mean cross entropy of (inputs, labels)."""
        import torch

        inputs, labels = batch
        return torch.nn.functional.cross_entropy(model(inputs), labels)

    def table(self, client: Client) -> Mapping[str, Any]:
        """Return the client's columns for `fedqueue describe`: name → one-dimensional array, one value for each row.

        Integers and floats are numbers, NaN is a missing value. Strings and booleans are categories; None and "" are
        missing values. No value leaves the site: only counts, sums and histograms do, each about enough rows. Called at
        the client's site, before training, with the columns that `prepare` needs.

        >>> import numpy as np
        >>> from fedqueue import Client, Task
        >>> class Hearts(Task):
        ...     def table(self, client):
        ...         return {"age": np.array([61.0, 58.0, np.nan]), "ill": np.array(["yes", "no", "yes"])}
        >>> sorted(Hearts().table(Client("north")))
        ['age', 'ill']
        """
        raise TaskError(
            f"{type(self).__name__} must define table(self, client) -> Mapping[str, ndarray], the columns to describe"
        )

    def prepare(self, statistics: Statistics) -> None:
        """Take what `fedqueue describe` found over all sites, such as means to scale by or to fill gaps with.

        Called once in each process, on the coordinator and at each site, before `model`, `train_data` and `test_data`,
        where `statistics.file` is set. All of them get the same values.

        >>> from fedqueue import Task
        >>> class Hearts(Task):
        ...     def prepare(self, statistics):
        ...         self.mean = statistics.numbers("age").mean
        """
        raise TaskError(
            f"statistics.file is set, so {type(self).__name__} must define prepare(self, statistics), "
            "or statistics.file must be left out"
        )

    def evaluate(self, model: torch.nn.Module, data: Any) -> dict[str, float]:
        """Return metrics of `model` on `data`, what `test_data` returned: numbers by name.

        The caller has put `model` in eval mode, and gradients are off. The default is the mean `loss` over batches of
        any kind, and `accuracy` for (inputs, labels) batches if `loss` calls `model(inputs)` once, the scores have the
        classes in dimension 1, and the labels are integers of the scores' shape without that dimension. Raises
        TaskError for data without examples.
        """
        from fedqueue.evaluation import evaluate_by_loss

        return evaluate_by_loss(self, model, data)

    def fit(self, model: torch.nn.Module, data: Any, config: TrainingConfig, progress: Progress) -> TrainResult:
        """Train `model` in place on `data`, what `train_data` returned. The default trains as `[training]` says.

        `progress.client` and `progress.version` say for which client and from which version. An override calls
        `progress()` after each batch, and returns how many examples it trained on.
        """
        from fedqueue.training import train

        return train(self, model, data, config, progress)

    def num_examples(self, data: Any) -> int | None:
        """Return the number of examples in `data`: the client's weight in an algorithm that weights by examples.

        None for a stream without a length, whose examples are counted in training. Raises TaskError for other data
        without a length.
        """
        import torch

        if isinstance(data, torch.utils.data.DataLoader):
            return self.num_examples(data.dataset)
        if isinstance(data, Sized):
            return len(data)
        if isinstance(data, torch.utils.data.IterableDataset):
            return None
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


def prepare_task(task: Task, config: Config) -> Config:
    """Give the task the statistics of the configuration, if there are any, and return the configuration with them.

    Raises ConfigurationError where statistics.file cannot be read, and TaskError for whatever `Task.prepare` raises.
    """
    config = config.with_statistics()
    if not config.statistics.values:
        return config
    from fedqueue.statistics.pooled import read_statistics

    statistics = read_statistics(config.statistics)
    try:
        task.prepare(statistics)
    except TaskError:
        raise
    except (Exception, SystemExit) as error:
        raise TaskError(f"{type(task).__name__}.prepare(statistics): {exception_with_place(error)}") from error
    return config


def make_model(task: Task) -> torch.nn.Module:
    """Return `task.model()`. Raises TaskError for whatever the method raises, which is its cause, and for no module.

    A KeyboardInterrupt passes where Python's own handler of SIGINT may have raised it; else it is the task's.
    """
    import torch

    try:
        model = task.model()
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt) and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            raise
        raise TaskError(f"{type(task).__name__}.model(): {exception_with_place(error)}") from error
    if not isinstance(model, torch.nn.Module):
        raise TaskError(f"{type(task).__name__}.model() returned {type(model).__name__}; expected a torch.nn.Module")
    return model
