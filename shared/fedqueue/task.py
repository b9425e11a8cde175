"""What a user of fedqueue writes: a `Task`.

The same class runs on both sides. The coordinator calls `model`, `test_data` and `evaluate`; a worker calls
`model`, `train_data`, `loss` and `fit`. Only a worker ever sees training data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedqueue.config.entrypoint import import_entrypoint
from fedqueue.errors import TaskError

if TYPE_CHECKING:
    import torch

    from fedqueue.config.training import TrainingConfig

Progress = Callable[[], None]
"""Call it after each batch: it renews the job's lease, and raises `JobClosed` when the work is no longer wanted."""


@dataclass(frozen=True)
class Client:
    """Whose data to load. `partition` of `partitions` is None for a client that brings its own data."""

    id: str
    partition: int | None = None
    partitions: int | None = None


@dataclass(frozen=True)
class TrainResult:
    """What a local training reports beside the model: counts and averages, never rows of data."""

    num_examples: int
    metrics: Mapping[str, float] = field(default_factory=dict)


class Task:
    """One learning problem. Subclass it, override `model` and `train_data`, and what else differs.

    `[task.options]` of the configuration become the keyword arguments of the constructor.
    """

    def model(self) -> torch.nn.Module:
        """A freshly initialised model; the run's seed is set before the call."""
        raise NotImplementedError(f"{type(self).__name__} must define model(self) -> torch.nn.Module")

    def train_data(self, client: Client) -> Any:
        """The client's own examples, as a `torch.utils.data.Dataset`. Called on the worker only, once."""
        raise NotImplementedError(f"{type(self).__name__} must define train_data(self, client) -> Dataset")

    def test_data(self) -> Any:
        """The coordinator's own held-out examples, or None: then there is no central evaluation."""
        return None

    def loss(self, model: torch.nn.Module, batch: Any) -> torch.Tensor:
        """The scalar to minimise on one batch; by default the cross entropy of (inputs, labels)."""
        import torch

        inputs, labels = batch
        return torch.nn.functional.cross_entropy(model(inputs), labels)

    def evaluate(self, model: torch.nn.Module, data: Any) -> dict[str, float]:
        """Metrics of `model` on `data`; by default mean `loss` and, for classifiers, `accuracy`."""
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
        """Train `model` in place on `data`; by default mini-batch training as `[training]` says.

        An override calls `progress()` after each batch, and returns how many examples it trained on.
        """
        from fedqueue.training import train

        return train(self, model, data, config, progress)

    def num_examples(self, data: Any) -> int:
        """How many examples `data` holds: the weight of this client where weights are by examples."""
        if isinstance(data, Sized):
            return len(data)
        raise TaskError(f"{type(data).__name__} has no len(): override Task.num_examples(self, data) to count it")


def load_task(entrypoint: str, options: Mapping[str, Any], folder: Path) -> Task:
    """The task that `entrypoint` names: `path/to/file.py:Class` (relative to `folder`) or `package.module:Class`.

    Raises TaskError with what is missing; an exception of the user's own module or constructor is its cause.
    """
    where, colon, name = entrypoint.rpartition(":")
    if not colon or not where or not name.isidentifier():
        raise TaskError(f"task.entrypoint = {entrypoint!r}: expected path/to/task.py:Class or package.module:Class")
    module, _ = import_entrypoint(entrypoint, folder, "task.entrypoint")
    cls = getattr(module, name, None)
    if not (isinstance(cls, type) and issubclass(cls, Task)):
        tasks = [n for n, v in vars(module).items() if isinstance(v, type) and issubclass(v, Task) and v is not Task]
        raise TaskError(f"{where} has no Task named {name!r}; it has: {', '.join(tasks) or 'none'}")
    try:
        return cls(**options)
    except Exception as error:
        raise TaskError(f"{name}(**task.options) with {dict(options)}: {type(error).__name__}: {error}") from error
