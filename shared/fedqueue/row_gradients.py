"""The gradient of each row by itself, clipped, and summed: what DP-SGD adds noise to.

A row's gradient is that of `Task.loss` on a batch of this row alone, so no other row has a part in it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import structlog
import torch
from torch.func import functional_call, grad, vmap

from fedqueue.batches import stack_batches, to_device
from fedqueue.errors import TaskError
from fedqueue.exception_text import exception_text
from fedqueue.task import Task

log = structlog.get_logger("fedqueue.worker")

MOST_NUMBERS = 2**24
"""Rows are taken together as long as their gradients have at most this many elements."""


class _LossOfBatch(torch.nn.Module):
    """`task.loss(model, batch)` as a module, so that `functional_call` can exchange the model's parameters."""

    def __init__(self, task: Task, model: torch.nn.Module) -> None:
        super().__init__()
        self.model, self._task = model, task

    def forward(self, batch: Any) -> torch.Tensor:
        loss = self._task.loss(self.model, batch)
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
            what = f"shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else type(loss).__name__
            raise TaskError(f"{type(self._task).__name__}.loss returned {what}: return a scalar tensor, the mean loss")
        return loss.reshape(())


class RowGradients:
    """Gradients of rows of `data`, over the trainable parameters of `model` jointly."""

    def __init__(self, task: Task, model: torch.nn.Module, data: Any, device: torch.device, together: bool) -> None:
        """`together`: by `torch.func.vmap`; rows that it cannot take are computed one after the other, as without."""
        self._task, self._data, self._device, self._together = task, data, device, together
        self._module = _LossOfBatch(task, model)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        """The trainable parameters; a gradient has their elements in this order."""
        self.size = sum(p.numel() for p in self.parameters)
        self._wide = torch.device("cpu") if device.type == "mps" else device  # MPS has no float64

    def clipped_sum(self, rows: npt.NDArray[np.int64], clip_norm: float) -> torch.Tensor:
        """Return Σ g · min(1, C / ‖g‖) over the gradients g of these rows, float64 (size,); zeros without rows.

        A gradient that is not finite counts as 0. Raises what `Task.loss` raises.
        """
        total = torch.zeros(self.size, dtype=torch.float64, device=self._wide)
        piece = max(1, MOST_NUMBERS // max(1, self.size))
        for at in range(0, len(rows), piece):
            gradients = self.of(rows[at : at + piece])
            norms = torch.linalg.vector_norm(gradients, dim=1, keepdim=True)
            finite = torch.isfinite(norms)
            scaled = gradients * (clip_norm / norms.clamp_min(clip_norm))
            total += torch.where(finite, scaled, 0.0).sum(0)
        return total

    def of(self, rows: npt.NDArray[np.int64]) -> torch.Tensor:
        """Return the gradient of each of these rows, float64 (rows, size)."""
        if self._together:
            try:
                return self._of_all(rows)
            except Exception as error:
                gradients = self._of_each(rows)  # raises where the loss itself is at fault
                self._together = False
                _log_one_by_one(type(self._task).__name__, exception_text(error))
                return gradients
        return self._of_each(rows)

    def _of_all(self, rows: npt.NDArray[np.int64]) -> torch.Tensor:
        def loss(parameters: Mapping[str, torch.Tensor], batch: Any) -> torch.Tensor:
            result: torch.Tensor = functional_call(self._module, dict(parameters), (batch,))
            return result

        parameters = {n: p.detach() for n, p in self._module.named_parameters() if p.requires_grad}
        gradients = vmap(grad(loss), in_dims=(None, 0), randomness="different")(parameters, self._stacked(rows))
        return self._flat(list(gradients.values()), len(rows))

    def _of_each(self, rows: npt.NDArray[np.int64]) -> torch.Tensor:
        gradients = []
        for row in rows:
            versions = [p._version for p in self.parameters]
            loss = self._module(to_device(self._batch_of(int(row)), self._device))
            found = torch.autograd.grad(loss, self.parameters, allow_unused=True)
            if versions != [p._version for p in self.parameters]:
                raise TaskError("the model changes its parameters while it computes the loss, which has no noise")
            dense = [torch.zeros_like(p) if g is None else g for g, p in zip(found, self.parameters, strict=True)]
            gradients.append(self._flat([g[None] for g in dense], 1))
        return torch.cat(gradients)

    def _flat(self, gradients: Sequence[torch.Tensor], rows: int) -> torch.Tensor:
        flat = torch.cat([g.detach().reshape(rows, -1) for g in gradients], 1)
        return flat.to(self._wide).double()

    def _stacked(self, rows: npt.NDArray[np.int64]) -> Any:
        """Return the batches of one row each, stacked in a new first dimension."""
        plain = type(self._data) is torch.utils.data.TensorDataset or (
            isinstance(self._data, torch.utils.data.TensorDataset)
            and type(self._data).__getitem__ is torch.utils.data.TensorDataset.__getitem__
        )
        if plain and getattr(self._task.collate_fn, "__func__", None) is Task.collate_fn:
            index = torch.from_numpy(rows)
            return to_device([tensor[index].unsqueeze(1) for tensor in self._data.tensors], self._device)
        return to_device(stack_batches([self._batch_of(int(row)) for row in rows]), self._device)

    def _batch_of(self, row: int) -> Any:
        return self._task.collate_fn([self._data[row]])


@functools.cache
def _log_one_by_one(task: str, why: str) -> None:
    """Log once for each task and reason."""
    log.warning(
        "gradients are computed row by row, which is slow: torch.func.vmap cannot take this loss; set "
        "privacy.examples.backend to 'loop' to choose that",
        task=task,
        why=why.splitlines()[0] if why else "",
    )
