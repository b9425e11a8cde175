"""The default local training: mini-batches, a `torch.optim` optimizer by name, and what `[training]` adds to it."""

from __future__ import annotations

import contextlib
import functools
import inspect
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any

import numpy as np
import structlog
import torch

from fedqueue.batches import rows_in, to_device
from fedqueue.config.training import TrainingConfig
from fedqueue.errors import ConfigurationError, TaskError
from fedqueue.learning_rates import learning_rates, rate_of_version
from fedqueue.task import Progress, Task, TrainResult

log = structlog.get_logger("fedqueue.worker")

ONE_ROW = "Expected more than 1 value per channel when training"
"""The beginning of the ValueError of a BatchNorm layer of torch for a batch of one row."""
PRECISIONS = {"bfloat16": torch.bfloat16, "float16": torch.float16}
SPARSE_HINT = (
    "the model has sparse gradients: use sgd without weight_decay, or adagrad, or make its embeddings with sparse=False"
)
PLAIN_OPTIMIZERS = {"sgd", "adam", "adamw", "rmsprop", "adagrad"}
"""Optimizers that step on any dense gradient, and so need no trial where they have no options."""


def train(
    task: Task, model: torch.nn.Module, data: Any, config: TrainingConfig, progress: Progress | Callable[[], None]
) -> TrainResult:
    """Train `model` in place on `data`; metrics: mean training `loss` over the batches.

    `data` is a Dataset, map-style or iterable, or a DataLoader, whose batches are then taken as they are. With
    `proximal_mu` > 0, each batch's loss is that of FedProx (arXiv 1812.06127, eq. 2): f(x) + μ/2 · ‖x − x_b‖², x_b
    being the parameters as they are when training starts. The order of examples follows torch's global seed, which the
    caller sets per job. A batch of one row is left out where a BatchNorm layer refuses it. A job whose rows are
    protected (`[privacy.examples]`) trains as `fedqueue.private_training` says, and has no metrics.

    Raises TaskError for data of another kind, for a loss that is no scalar, and where no batch could be trained on.
    """
    if not isinstance(progress, Progress):
        progress = Progress(progress)
    if progress.private:
        return progress.private.train(task, model, data, progress)
    device = choose_device(config.device)
    model.to(device).train()
    base = [p.detach().clone() for p in model.parameters()] if config.proximal_mu else []
    steps = LocalSteps(model, config, device, progress)
    total = 0.0
    batches = left_out = 0
    passes: list[int] = []  # rows of each pass
    for number, batch in _batches(task, data, config):
        moved = to_device(batch, device)
        steps.begin_batch()
        loss = _loss_of(task, model, moved, steps.autocast)
        if loss is None:
            left_out += 1
            continue
        if number == len(passes):
            passes.append(0)
        passes[number] += rows_in(moved)
        total, batches = total + float(loss.detach()), batches + 1
        if base:
            drift = sum(((p - b) ** 2).sum() for p, b in zip(model.parameters(), base, strict=True))
            loss = loss + config.proximal_mu / 2 * drift
        steps.end_batch(loss)
        progress()
    steps.finish()
    if not batches:
        raise TaskError(_why_no_batch(data, config, left_out))
    if left_out:
        _log_left_out(progress.client.id)
    examples = task.num_examples(data)
    return TrainResult(max(passes) if examples is None else examples, {"loss": total / batches})


class LocalSteps:
    """The optimizer's steps: one for each `accumulate_batches` batches, on their mean gradient."""

    def __init__(
        self, model: torch.nn.Module, config: TrainingConfig, device: torch.device, progress: Progress
    ) -> None:
        rate = rate_of_version(config.learning_rate, config.schedule, "training.schedule", progress.version)
        self._config, self._memory = config, progress.memory
        self._parameters = list(model.parameters())
        self._optimizer = make_optimizer(config.optimizer, self._parameters, rate, config.optimizer_options)
        self._rates = (
            learning_rates(rate, config.local_schedule, "training.local_schedule")
            if config.local_schedule.name
            else None
        )
        dtype = PRECISIONS.get(config.precision)
        self.autocast = torch.autocast(device.type, dtype) if dtype else contextlib.nullcontext()
        self._scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "float16")
        self._batches = 0  # since the last step
        if config.keep_optimizer_state:
            self._restore(rate)

    def begin_batch(self) -> None:
        """Reset the gradients where the batch begins a step."""
        if not self._batches:
            self._optimizer.zero_grad(set_to_none=True)

    def end_batch(self, loss: torch.Tensor) -> None:
        """Add the batch's gradient, and step if it is the last one of its step."""
        self._scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        self._batches += 1
        if self._batches == self._config.accumulate_batches:
            self.step()

    def finish(self) -> None:
        """Step on the batches that are left, and keep the optimizer's state where the configuration says so."""
        if self._batches:
            self.step()
        if self._config.keep_optimizer_state:
            self._memory["optimizer"] = self._optimizer.state_dict(), self._scaler.state_dict()

    def step(self) -> None:
        """Step on the gradients that the parameters have."""
        if self._rates:
            rate = next(self._rates)
            for group in self._optimizer.param_groups:
                group["lr"] = rate
        if self._batches > 1 or self._config.max_grad_norm:
            self._scaler.unscale_(self._optimizer)
        if self._batches > 1:
            for parameter in self._parameters:
                if parameter.grad is not None:
                    parameter.grad.div_(self._batches)
        if self._config.max_grad_norm:
            clip_grad_norm(self._parameters, self._config.max_grad_norm)
        self._batches = 0
        try:
            self._scaler.step(self._optimizer)
        except RuntimeError as error:
            if any(parameter.grad is not None and parameter.grad.is_sparse for parameter in self._parameters):
                raise TaskError(f"training.optimizer = {self._config.optimizer!r}: {error}; {SPARSE_HINT}") from error
            raise
        self._scaler.update()

    def _restore(self, rate: float) -> None:
        """Continue with the state that the client's last job left; the learning rate is this job's own."""
        if "optimizer" not in self._memory:
            return
        state, scale = self._memory["optimizer"]
        self._optimizer.load_state_dict(state)
        self._scaler.load_state_dict(scale)
        for group in self._optimizer.param_groups:
            group["lr"] = rate


def clip_grad_norm(parameters: Sequence[torch.Tensor], max_norm: float) -> None:
    """Scale the gradients down to an L2 norm of at most `max_norm`, as `torch.nn.utils.clip_grad_norm_`.

    Sparse gradients count too, which torch's function refuses.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not any(gradient.is_sparse for gradient in gradients):
        torch.nn.utils.clip_grad_norm_(parameters, max_norm)
        return
    for parameter in parameters:
        if parameter.grad is not None and parameter.grad.is_sparse:
            parameter.grad = parameter.grad.coalesce()
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norms = [torch.linalg.vector_norm(g.values() if g.is_sparse else g) for g in gradients]
    norm = torch.linalg.vector_norm(torch.stack(norms))
    scale = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    for gradient in gradients:
        gradient.mul_(scale)


def _loss_of(
    task: Task, model: torch.nn.Module, batch: Any, autocast: contextlib.AbstractContextManager[object]
) -> torch.Tensor | None:
    """The loss of a batch; None for a batch of one row that a BatchNorm layer refuses."""
    try:
        with autocast:
            loss = task.loss(model, batch)
    except ValueError as error:
        if str(error).startswith(ONE_ROW) and rows_in(batch) == 1:
            return None
        raise
    except RuntimeError as error:
        if hint := _dtype_hint(model, batch):
            raise TaskError(f"{type(error).__name__}: {error}; {hint}") from error
        raise
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
        shown = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else type(loss).__name__
        raise TaskError(f"{type(task).__name__}.loss returned {shown}: return the mean over the batch, a scalar tensor")
    return loss


def _dtype_hint(model: torch.nn.Module, batch: Any) -> str:
    """What to do about rows of another floating dtype than the model's; empty where none of the batch differs."""
    wanted = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, tuple | list) else [batch]
    for part in parts:
        if isinstance(part, torch.Tensor) and part.is_floating_point() and part.dtype != wanted:
            have, want = (str(dtype).removeprefix("torch.") for dtype in (part.dtype, wanted))
            return f"the data is {have}, and the model is {want}: convert it in train_data, with rows.to(torch.{want})"
    return ""


def _why_no_batch(data: Any, config: TrainingConfig, left_out: int) -> str:
    if left_out:
        return (
            "the model's BatchNorm layers need batches of two rows or more, and each batch has one: set "
            f"training.batch_size, which is {config.batch_size}, to 2 or more, or leave clients with one row out"
        )
    if config.drop_last and isinstance(data, Sized) and len(data):
        return (
            f"training.drop_last leaves no batch: the client has {len(data)} examples, and training.batch_size is "
            f"{config.batch_size}"
        )
    return "train_data(client) has no examples"


@functools.cache
def _log_left_out(client: str) -> None:
    """Log once for each client of the process."""
    log.warning(
        "a batch of one row is left out, because BatchNorm needs two; choose another training.batch_size, or set "
        "training.drop_last",
        client=client,
    )


# The machine


def set_seed(seed: int) -> None:
    """Seed torch, as `torch.manual_seed`, and the global generators of Python and numpy.

    Without an accelerator it skips `manual_seed`'s query of each kind of accelerator, which imports a compiler at its
    first call and records a stack trace at each further one.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)
    if torch.accelerator.is_available():
        torch.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)


def choose_device(name: str) -> torch.device:
    """The torch device of that name; `auto` means the accelerator that torch finds (CUDA, MPS, XPU, …), else the CPU.

    Raises ConfigurationError for a name that torch does not know.
    """
    if name == "auto":
        found = torch.accelerator.current_accelerator(check_available=True)
        return found or torch.device("cpu")
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise ConfigurationError("training.device", name, "not a torch device", "use auto, cpu or cuda:0") from error


def check_device(name: str) -> torch.device:
    """As `choose_device`; raises ConfigurationError too where this machine cannot compute on the device."""
    device = choose_device(name)
    try:
        torch.zeros(1, device=device)
    except (AssertionError, RuntimeError, NotImplementedError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        problem = f"torch {torch.__version__} cannot use {device} on this machine ({first})"
        raise ConfigurationError("training.device", name, problem, _usable()) from error
    return device


def _usable() -> str:
    found = torch.accelerator.current_accelerator(check_available=True)
    count = torch.accelerator.device_count() if found else 0
    names = ", ".join(f"{found.type}:{i}" for i in range(count)) if found else ""
    return f"use auto, cpu{f' or one of {names}' if names else ''}"


def check_training(config: TrainingConfig, device: torch.device, model: torch.nn.Module | None = None) -> None:
    """Try the optimizer, the schedules and the precision of `[training]`, so that a mistake shows before the run.

    The optimizer makes one step on a throwaway parameter, or with `model` on one for each number of dimensions that
    its parameters have, with sparse gradients where the model has them. Raises ConfigurationError.
    """
    next(learning_rates(config.learning_rate, config.schedule, "training.schedule"))
    next(learning_rates(config.learning_rate, config.local_schedule, "training.local_schedule"))
    parameters = [] if model is None else [p for p in model.parameters() if p.requires_grad]
    sparse = set() if model is None else _with_sparse_gradients(model)
    dense = {p.ndim for p in parameters if id(p) not in sparse}
    try_out_optimizer(config, device, dense if parameters else {2}, bool(sparse))
    if dtype := PRECISIONS.get(config.precision):
        try:
            with torch.autocast(device.type, dtype):
                torch.zeros(1, 1, device=device) @ torch.zeros(1, 1, device=device)
        except RuntimeError as error:
            raise ConfigurationError(
                "training.precision", config.precision, f"{device} cannot compute with it ({error})", "use float32"
            ) from error


def _with_sparse_gradients(model: torch.nn.Module) -> set[int]:
    """The ids of the weights of embeddings that were made with `sparse=True`."""
    embeddings = (m for m in model.modules() if isinstance(m, torch.nn.Embedding | torch.nn.EmbeddingBag))
    return {id(m.weight) for m in embeddings if m.sparse and m.weight.requires_grad}


def try_out_optimizer(
    config: TrainingConfig, device: torch.device, dimensions: Iterable[int], sparse: bool = False
) -> None:
    """Make one step on parameters with these numbers of dimensions; raises ConfigurationError.

    With `sparse`, one more parameter has a sparse gradient. A plain optimizer without options is not tried on dense
    gradients: it cannot fail, and its first instance costs a second.
    """
    kind = optimizer_class(config.optimizer)
    if config.optimizer.lower() in PLAIN_OPTIMIZERS and not config.optimizer_options and not sparse:
        return
    parameters = [torch.nn.Parameter(torch.zeros([1] * n, device=device)) for n in sorted(set(dimensions))]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    if sparse:
        embedding = torch.nn.Parameter(torch.zeros(1, 1, device=device))
        embedding.grad = torch.zeros_like(embedding).to_sparse(1)
        parameters.append(embedding)
    optimizer = make_optimizer(config.optimizer, parameters, config.learning_rate, config.optimizer_options)
    try:
        optimizer.step()
    except Exception as error:
        problem = f"torch.optim.{kind.__name__} cannot train in the default loop ({error})"
        hint = SPARSE_HINT if sparse else "name another optimizer, such as sgd, adam or adamw"
        raise ConfigurationError("training.optimizer", config.optimizer, problem, hint) from error


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
    except Exception as error:
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


# Batches


def make_loader(
    task: Task, data: Any, batch_size: int, shuffle: bool = False, drop_last: bool = False, workers: int = 0
) -> torch.utils.data.DataLoader[Any]:
    """A loader of `data` with the task's own `collate_fn`. A DataLoader is returned as it is. No stream is shuffled.

    Raises TaskError for data of another kind, and for a dataset without examples.
    """
    if isinstance(data, torch.utils.data.DataLoader):
        return data
    options: dict[str, Any] = {
        "batch_size": batch_size, "drop_last": drop_last, "num_workers": workers, "persistent_workers": workers > 0
    }  # fmt: skip
    own = task.collate_fn
    collate = None if getattr(own, "__func__", None) is Task.collate_fn else own
    if isinstance(data, torch.utils.data.IterableDataset):
        return torch.utils.data.DataLoader(data, collate_fn=collate, **options)
    if not hasattr(data, "__getitem__") or not isinstance(data, Sized) or isinstance(data, Mapping):
        raise TaskError(
            f"the data is of type {type(data).__name__}: return a torch.utils.data.Dataset, an IterableDataset or a "
            "DataLoader, or override the method that reads it"
        )
    if not len(data):
        raise TaskError("the data has no examples")
    fetched = _fetched_whole(data) if collate is None else {"dataset": data, "collate_fn": collate}
    return torch.utils.data.DataLoader(**fetched, shuffle=shuffle, **options)


def _batches(task: Task, data: Any, config: TrainingConfig) -> Iterator[tuple[int, Any]]:
    """(pass from 0, batch) of `local_epochs` passes over the data, or of `local_steps` batches in as many as needed."""
    loader = make_loader(task, data, config.batch_size, True, config.drop_last, config.loader_workers)
    done = number = 0
    while config.local_steps or number < config.local_epochs:
        before = done
        for batch in loader:
            yield number, batch
            done += 1
            if done == config.local_steps:
                return
        if done == before:  # a stream that has ended, or fewer rows than a batch
            return
        number += 1


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
