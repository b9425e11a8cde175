"""DP-SGD (Abadi et al., arXiv 1607.00133): the local training of a job whose rows are protected.

Each step includes each of the n rows with probability q = batch_size / n, clips each row's gradient to norm C, sums,
adds Gaussian noise of standard deviation z · C, and divides by q · n. The client's optimizer then steps on the result.
A step that includes no row is a step on noise alone.
"""

from __future__ import annotations

import hashlib
import inspect
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fedqueue.config.privacy import ExamplePrivacyConfig
from fedqueue.config.training import TrainingConfig
from fedqueue.errors import ConfigurationError, TaskError
from fedqueue.privacy.secret_random import SecretRandom, with_noise
from fedqueue.privacy.spending import Charge, charge_of_job, countable_rows
from fedqueue.protocol.messages import Order
from fedqueue.row_gradients import RowGradients
from fedqueue.task import Progress, Task, TrainResult
from fedqueue.tensors.module_tensors import tensors_by_name
from fedqueue.training import LocalSteps, choose_device

MIXES_ROWS = (torch.nn.modules.batchnorm._BatchNorm,)
"""Layers whose output for a row depends on the other rows of the batch."""


class PrivateJob:
    """The privacy of one job: settings, noise, and the check that nothing but private steps changed the model.

    A `fit` of the task's own may surround the default one, for example to evaluate the model as it came. It may not
    train: the model that leaves must be, bit for bit, the one that the private steps made of the base version.
    """

    def __init__(
        self, privacy: ExamplePrivacyConfig, training: TrainingConfig, rows: int, key: bytes, model: torch.nn.Module
    ) -> None:
        """`model` holds the base version. `key`: 32 bytes, secret, used for this job only."""
        self.privacy, self.training, self.rows = privacy, training, rows
        self.charge = charge_of_job(privacy, training, rows)
        self._noise = SecretRandom(key, "noise")
        self._sampling = sampling_of(key)
        self._expected = _state_of(model)
        self._trainable = [name for name, tensor in tensors_by_name(model).items() if tensor.requires_grad]
        self._trained = False

    def train(self, task: Task, model: torch.nn.Module, data: Any, progress: Progress) -> TrainResult:
        """Train `model` in place by DP-SGD, with the job's settings; the result has no metrics, which would be of rows.

        FedProx's term and the optimizer's options, such as weight decay, act on the noisy gradient: they see no row.
        Raises TaskError for a second training, for a model that is not the base version any more, and for a number of
        rows that has changed since the job began.
        """
        if countable_rows(data) != self.rows:
            raise TaskError(f"the data has {countable_rows(data)} rows in fit, and had {self.rows} when the job began")
        if self._trained:
            raise TaskError(f"{type(task).__name__}.fit trains twice, and the privacy of one training was paid for")
        self._require_unchanged(task, model)
        config, charge, clip_norm = self.training, self.charge, self.privacy.clip_norm
        device = choose_device(config.device)
        model.to(device).train()
        gradients = RowGradients(task, model, data, device, together=self.privacy.backend == "vmap")
        base = [p.detach().clone() for p in gradients.parameters] if config.proximal_mu else []
        steps = LocalSteps(model, config, device, progress)
        for _ in range(charge.steps):
            chosen = self._sampling.chosen(self.rows, charge.sampling_rate)
            total = gradients.clipped_sum(chosen, clip_norm)
            noisy = with_noise(total, charge.noise_multiplier * clip_norm, self._noise)
            mean = noisy / (charge.sampling_rate * self.rows)
            parts = torch.split(mean, [p.numel() for p in gradients.parameters])
            for number, (parameter, part) in enumerate(zip(gradients.parameters, parts, strict=True)):
                parameter.grad = part.reshape(parameter.shape).to(parameter.device, parameter.dtype)
                if base:
                    parameter.grad += config.proximal_mu * (parameter.detach() - base[number])
            steps.step()
            progress()
        steps.finish()
        self._trained = True
        trained = _state_of(model)
        self._expected.update((name, trained[name]) for name in self._trainable)
        return TrainResult(task.num_examples(data) or self.rows)

    def check(self, task: Task, model: torch.nn.Module) -> None:
        """Raises TaskError where something else than the private steps has changed the model."""
        if not self._trained:
            raise TaskError(
                f"{type(task).__name__}.fit did not train by Task.fit, so its update would not be private: call "
                "super().fit(model, data, config, progress), or leave [privacy.examples] out"
            )
        self._require_unchanged(task, model)

    def _require_unchanged(self, task: Task, model: torch.nn.Module) -> None:
        for name, tensor in _state_of(model).items():
            expected = self._expected.get(name)
            if expected is None or not _same_bits(tensor, expected):
                raise TaskError(
                    f"{type(task).__name__} changes {name!r} outside of the private steps, and so without noise: "
                    "with [privacy.examples], fit may only call super().fit, and no layer may keep statistics of rows"
                )


def _state_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all parameters and buffers, those that are never saved too: a gradient could depend on them."""
    tensors = {**dict(model.named_buffers()), **tensors_by_name(model)}
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


def _same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    both = [tensor.reshape(-1).view(torch.uint8) for tensor in (first, second)]
    return first.dtype == second.dtype and torch.equal(*both)


def sampling_of(key: bytes) -> SecretRandom:
    """Return the stream that decides which rows the steps of a job include, from the job's key."""
    return SecretRandom(key, "sampling")


def simulated_key(seed: int, order: Order) -> bytes:
    """Return the key of a simulated job: it follows from the seed, so that a simulation can be repeated."""
    text = f"fedqueue/1 simulated noise {seed} {order.run} {order.client} {order.seed}"
    return hashlib.sha256(text.encode()).digest()


def rows_of_steps(key: bytes, charge: Charge, rows: int) -> npt.NDArray[np.int64]:
    """Return the rows that the steps of a job with this key include, int64 (k,), in ascending order."""
    sampling = sampling_of(key)
    steps = [sampling.chosen(rows, charge.sampling_rate) for _ in range(charge.steps)]
    return np.unique(np.concatenate(steps))


def check_example_privacy(privacy: ExamplePrivacyConfig, task: Task, model: torch.nn.Module) -> None:
    """Raises ConfigurationError where the rows of `task` cannot be protected: for the model's layers and for `fit`."""
    if not privacy.on:
        return
    for name, module in model.named_modules():
        layer = f"{type(module).__name__} ({name or 'the model itself'})"
        if isinstance(module, MIXES_ROWS) or (getattr(module, "track_running_stats", False)):
            raise ConfigurationError(
                "privacy.examples", None, f"the model has {layer}, which mixes the rows of a batch and keeps their "
                "statistics", "replace it by torch.nn.GroupNorm or LayerNorm, or leave [privacy.examples] out",
            )  # fmt: skip
        if isinstance(module, torch.nn.Embedding | torch.nn.EmbeddingBag):
            for option in ("sparse", "max_norm"):
                if getattr(module, option):
                    raise ConfigurationError(
                        "privacy.examples", None, f"the model has {layer} with {option}, which changes the rows of "
                        "the table that occur", f"make it without {option}",
                    )  # fmt: skip
    if task.stateful_clients:
        raise ConfigurationError(
            "privacy.examples", None, f"{type(task).__name__}.stateful_clients is set, so that a job would find in the "
            "model what rows of an earlier one left there", "leave one of the two out",
        )  # fmt: skip
    fit: Any = inspect.unwrap(type(task).fit)
    if fit is not Task.fit and "fit" not in fit.__code__.co_names:
        raise ConfigurationError(
            "privacy.examples", None, f"{type(task).__name__} has a fit of its own, whose updates would not be private",
            "let fit call super().fit(model, data, config, progress) for the training, or leave [privacy.examples] out",
        )  # fmt: skip
