"""Rows of a task's data as the attacks take them, parts of a data set, and the loss of each row."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Sized
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fedqueue.batches import to_device
from fedqueue.errors import TaskError
from fedqueue.evaluation import eval_mode
from fedqueue.leak.statistics import Numbers
from fedqueue.privacy.spending import charge_of_job, countable_rows
from fedqueue.private_training import rows_of_steps
from fedqueue.protocol.messages import Order
from fedqueue.task import Task
from fedqueue.training import make_loader, set_seed

MOST_ROWS = 512
"""Rows of one client that an attack is tried on; of a larger data set, as many are drawn."""
HOLD_OUT = 4
"""Every fourth row is held out where the task has no test data."""
FEWEST_ROWS = 8
RARE = 0.02

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Rows:
    """Rows of one data set."""

    batches: list[Any]
    """Each row as a batch of one."""
    indices: Indices
    """The places of the rows in the data set, int64 (n,)."""
    inputs: torch.Tensor | None
    """float32 (n, …); None where a batch is no pair of a floating tensor and an integer label."""
    labels: torch.Tensor | None
    """int64 (n,); None as `inputs`."""

    def __len__(self) -> int:
        return len(self.batches)

    def chosen(self, places: Indices) -> Rows:
        """The rows at these places among these rows, int64 (k,)."""
        inputs, labels = (
            None if part is None else part[torch.from_numpy(places)] for part in (self.inputs, self.labels)
        )
        return Rows([self.batches[i] for i in places], self.indices[places], inputs, labels)


def rows_of(task: Task, data: Any, seed: int, first: Indices | None = None, most: int = MOST_ROWS) -> Rows:
    """Return rows of `data`, a Dataset or a DataLoader: all of them, or `most` drawn with `seed`, those of `first`
    before others.

    Of a stream the first `most`. Raises TaskError for data of another kind.
    """
    if isinstance(data, torch.utils.data.DataLoader):
        data = data.dataset
    indices = np.arange(most)
    if isinstance(data, Sized) and not isinstance(data, torch.utils.data.IterableDataset):
        indices = np.arange(len(data))
        if len(data) > most:
            rng = np.random.default_rng(seed)
            preferred = np.unique(first) if first is not None else indices[:0]
            others = np.setdiff1d(indices, preferred)
            indices = np.sort(np.concatenate([rng.permutation(preferred), rng.permutation(others)])[:most])
            data = torch.utils.data.Subset(data, indices.tolist())  # type: ignore[arg-type]
    batches = list(itertools.islice(make_loader(task, data, 1), most))
    pairs = [batch for batch in batches if _labelled(batch)]
    inputs = labels = None
    if pairs and len(pairs) == len(batches) and len({pair[0].shape for pair in pairs}) == 1:
        inputs = torch.cat([pair[0] for pair in pairs]).float()
        labels = torch.cat([pair[1] for pair in pairs]).long()
    return Rows(batches, indices[: len(batches)], inputs, labels)


def _labelled(batch: Any) -> bool:
    """Whether the batch of one row is a pair of a floating tensor (1, …) and an integer label (1,)."""
    if not (isinstance(batch, tuple | list) and len(batch) == 2):
        return False
    inputs, labels = batch
    return (
        isinstance(inputs, torch.Tensor) and inputs.is_floating_point() and inputs.ndim > 1
        and isinstance(labels, torch.Tensor) and labels.shape == (1,)
        and labels.dtype in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
    )  # fmt: skip


def rows_of_job(task: Task, data: Any, order: Order, noise_key: bytes = b"") -> Indices | None:
    """Return the rows of `data` that a job of `local_steps` batches sees, int64 (k,); None for all of them.

    All rows are assumed as well where the task has a `fit` of its own or the data no length. Where the order protects
    rows, the job has drawn them with its `noise_key`, and all of them are assumed without it.
    """
    if order.privacy:
        if not noise_key:
            return None
        rows = countable_rows(data)
        return rows_of_steps(noise_key, charge_of_job(order.privacy, order.training, rows), rows)
    training = order.training
    mapped = isinstance(data, Sized) and not isinstance(
        data, torch.utils.data.DataLoader | torch.utils.data.IterableDataset
    )
    if not (mapped and training.local_steps and type(task).fit is Task.fit):
        return None
    count = len(data)
    if training.local_steps * training.batch_size >= count:
        return None
    set_seed(order.seed)
    numbers = torch.utils.data.TensorDataset(torch.arange(count))
    plain = Task()  # its collate_fn, not the task's, which takes the task's own rows
    loader = make_loader(plain, numbers, training.batch_size, True, training.drop_last)
    batches = [batch[0] for batch in itertools.islice(loader, training.local_steps)]
    return torch.cat(batches).numpy()


def all_of(jobs: Iterable[Indices | None]) -> Indices | None:
    """Return the rows that any of the jobs has seen; None for all rows."""
    seen = list(jobs)
    known = [rows for rows in seen if rows is not None]
    return np.unique(np.concatenate(known)) if known and len(known) == len(seen) else None


def part(data: Any, indices: Indices) -> Any:
    """Return the rows `indices` of a map-style data set, which keeps its type and attributes if it holds tensors.

    Raises TaskError for a stream and for data without a length.
    """
    if isinstance(data, torch.utils.data.TensorDataset):
        chosen = copy.copy(data)
        chosen.tensors = tuple(tensor[torch.from_numpy(indices)] for tensor in data.tensors)
        return chosen
    if isinstance(data, torch.utils.data.DataLoader | torch.utils.data.IterableDataset) or not isinstance(data, Sized):
        raise TaskError(
            f"leak must train on a part of the rows, and {type(data).__name__} cannot be divided: return a map-style "
            "Dataset from train_data, or rows that no client trains on from test_data"
        )
    return torch.utils.data.Subset(data, indices.tolist())  # type: ignore[arg-type]


def hold_out(data: Any, seed: int) -> tuple[Any, Any]:
    """Divide a client's data into rows to train on, three of four, and rows never trained on, drawn with `seed`.

    Raises TaskError for data that cannot be divided, and for fewer than 8 rows.
    """
    count = len(data) if isinstance(data, Sized) else 0
    if isinstance(data, Sized) and count < FEWEST_ROWS:
        raise TaskError(f"leak holds out a quarter of the rows to compare with: {count} rows are too few for that")
    order = np.random.default_rng(seed).permutation(count)
    return part(data, np.sort(np.delete(order, np.s_[::HOLD_OUT]))), part(data, np.sort(order[::HOLD_OUT]))


def matched(control: Rows, rows: Rows, seed: int) -> Rows:
    """Return those of `control`, drawn with `seed`, whose classes have the shares that they have in `rows`.

    Otherwise the attack on membership would measure which classes a client has. Without labels all of `control`.
    Raises TaskError where fewer than 8 rows are left.
    """
    if control.labels is None or rows.labels is None or control.inputs is None:
        return control
    share = np.bincount(rows.labels.numpy(), minlength=int(control.labels.max()) + 1) / len(rows)
    there = np.bincount(control.labels.numpy(), minlength=len(share))
    # Classes with fewer than 1 of 50 rows are left out, so that a rare one does not decide how many rows there are.
    common = share >= RARE
    total = float((there[common] / share[common]).min())
    wanted = np.where(common, np.floor(share * total), 0).astype(int)
    order = np.random.default_rng(seed).permutation(len(control))
    labels = control.labels.numpy()[order]
    chosen = np.sort(np.concatenate([order[labels == c][:n] for c, n in enumerate(wanted)]))
    if len(chosen) < FEWEST_ROWS:
        raise TaskError(
            f"leak has {len(chosen)} rows to compare with: of test_data, the part with a client's classes in its "
            "proportions; give test_data more rows of each class"
        )
    return control.chosen(chosen)


def row_losses(task: Task, model: torch.nn.Module, rows: Rows) -> Numbers:
    """Return `task.loss` of each row alone, with `model` in eval mode: float64 (n,)."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    with eval_mode(model):
        if type(task).loss is Task.loss and rows.inputs is not None and rows.labels is not None:
            scores = model(rows.inputs.to(device))
            losses = torch.nn.functional.cross_entropy(scores, rows.labels.to(device), reduction="none")
        else:
            losses = torch.stack([task.loss(model, to_device(b, device)).reshape(()) for b in rows.batches])
    return losses.double().cpu().numpy()
