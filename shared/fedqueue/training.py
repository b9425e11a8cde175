"""The default local training: mini-batches, a `torch.optim` optimizer by name, an optional proximal term."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from fedqueue.config.training import TrainingConfig
from fedqueue.errors import ConfigurationError
from fedqueue.task import Progress, Task, TrainResult


def train(task: Task, model: torch.nn.Module, data: Any, config: TrainingConfig, progress: Progress) -> TrainResult:
    """Train `model` in place on `data` (a map-style Dataset); metrics: mean training `loss` over the batches.

    With `proximal_mu` > 0, each batch's loss is that of FedProx (arXiv 1812.06127, eq. 2): f(x) + μ/2 · ‖x − x_b‖²,
    x_b being the parameters as they are when training starts. The order of examples follows torch's global seed,
    which the caller sets per job.
    """
    device = choose_device(config.device)
    model.to(device).train()
    base = [p.detach().clone() for p in model.parameters()] if config.proximal_mu else []
    optimizer = make_optimizer(config.optimizer, model.parameters(), config.learning_rate, config.optimizer_options)
    total = batches = 0.0
    for batch in _batches(data, config):
        optimizer.zero_grad(set_to_none=True)
        loss = task.loss(model, _to(batch, device))
        total, batches = total + float(loss.detach()), batches + 1
        if base:
            drift = sum(((p - b) ** 2).sum() for p, b in zip(model.parameters(), base, strict=True))
            loss = loss + config.proximal_mu / 2 * drift
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        progress()
    return TrainResult(task.num_examples(data), {"loss": total / batches} if batches else {})


def set_seed(seed: int) -> None:
    """Seed torch, as `torch.manual_seed`.

    Without an accelerator it skips `manual_seed`'s query of each kind of accelerator, which imports a compiler at its
    first call and records a stack trace at each further one.
    """
    if torch.accelerator.is_available():
        torch.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)


def choose_device(name: str) -> torch.device:
    """The torch device of that name; `auto` means CUDA if it is available, else the CPU.

    Raises ConfigurationError for a name that torch does not know.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise ConfigurationError("training.device", name, "not a torch device", "use auto, cpu or cuda:0") from error


def make_optimizer(
    name: str,
    parameters: Iterable[torch.nn.Parameter],
    learning_rate: float,
    options: Mapping[str, Any],
    key: str = "training",
) -> torch.optim.Optimizer:
    """A `torch.optim` optimizer by its name, in upper or lower case.

    `key` is the section of the configuration that contains name and options. Raises ConfigurationError, which lists
    the known names, for another name or invalid options.
    """
    kind = optimizer_class(name, key)
    try:
        made: torch.optim.Optimizer = kind(parameters, lr=learning_rate, **options)
        return made
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"{key}.optimizer_options", dict(options), f"torch.optim.{name}: {error}") from error


def optimizer_class(name: str, key: str = "training") -> Any:
    """The class of that name in `torch.optim`; raises ConfigurationError.

    Constructing an instance imports one of torch's compilers: a second, and 70 MB for the life of the process.
    """
    known = {
        n.lower(): c
        for n, c in vars(torch.optim).items()
        if inspect.isclass(c) and issubclass(c, torch.optim.Optimizer) and c is not torch.optim.Optimizer
    }
    if name.lower() not in known:
        option = "optimizer" if key == "training" else "name"
        raise ConfigurationError(
            f"{key}.{option}", name, "not an optimizer of torch.optim", f"known: {', '.join(sorted(known))}"
        )
    return known[name.lower()]


def _batches(data: Any, config: TrainingConfig) -> Iterator[Any]:
    """The batches of `local_epochs` passes over the data, or `local_steps` batches of as many passes as needed."""
    loader: torch.utils.data.DataLoader[Any] = torch.utils.data.DataLoader(
        **_fetched_whole(data), batch_size=config.batch_size, shuffle=True
    )
    limit = config.local_steps or math.inf
    done = 0
    while done < limit:
        for batch in loader:
            yield batch
            done += 1
            if done >= limit:
                return
        if not config.local_steps and done >= config.local_epochs * len(loader):
            return


class _Batches(torch.utils.data.Dataset[Any]):
    """A TensorDataset that is indexed once per batch, not once per example: the same rows in the same order."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._tensors = tensors

    def __len__(self) -> int:
        return len(self._tensors[0])

    def __getitems__(self, rows: list[int]) -> list[torch.Tensor]:
        return [tensor[rows] for tensor in self._tensors]


def _fetched_whole(data: Any) -> dict[str, Any]:
    """Arguments of a DataLoader over `data`; batches of a plain TensorDataset need no stacking of examples."""
    plain = isinstance(data, torch.utils.data.TensorDataset)
    if plain and type(data).__getitem__ is torch.utils.data.TensorDataset.__getitem__ and data.tensors:
        return {"dataset": _Batches(data.tensors), "collate_fn": list}
    return {"dataset": data}


def _to(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, torch.Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: _to(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        return (
            type(batch)(*(_to(b, device) for b in batch))
            if hasattr(batch, "_fields")
            else [_to(b, device) for b in batch]
        )
    return batch
