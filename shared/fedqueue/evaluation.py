"""The default evaluation: the mean of the task's own loss, and accuracy where labels and scores have its shapes."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sized
from typing import Any

import torch

from fedqueue.batches import rows_in, to_device
from fedqueue.errors import TaskError
from fedqueue.exception_text import exception_with_place
from fedqueue.metrics import as_number
from fedqueue.task import Task
from fedqueue.training import make_loader

BATCH_SIZE = 512
EMPTY = "test_data() is empty: return None where there is nothing to evaluate on"
NO_GRADIENT = "does not require grad and does not have a grad_fn"
"""Part of the RuntimeError of torch for a gradient of what was computed without."""
IGNORED_LABEL = -100
"""The label that `torch.nn.functional.cross_entropy` leaves out by default (`ignore_index`)."""


def evaluate_by_loss(task: Task, model: torch.nn.Module, data: Any) -> dict[str, float]:
    """Return the mean `loss` of `task.loss` on `data`, weighted by the rows of each batch, and `accuracy` or not.

    `data` is a Dataset, map-style or iterable, or a DataLoader, whose batches are then taken as they are. `accuracy` is
    the fraction of the labels that equal the class with the highest score. It is part of the result if, in each batch,
    `count_correct` can tell. Raises TaskError for data without examples.
    """
    if isinstance(data, Sized) and not isinstance(data, torch.utils.data.DataLoader) and not len(data):
        raise TaskError(EMPTY)
    batches = make_loader(task, data, BATCH_SIZE)
    tensors = itertools.chain(model.parameters(), model.buffers())
    device = next((tensor.device for tensor in tensors), torch.device("cpu"))
    total = 0.0
    rows = correct = labelled = 0
    countable = True
    with eval_mode(model):
        for batch in batches:
            on_device = to_device(batch, device)
            loss, scores = _loss_and_scores(task, model, on_device)
            weight = rows_in(on_device)
            total, rows = total + as_number("loss", loss, "Task.loss returned") * weight, rows + weight
            counts = count_correct(scores, on_device[1], task) if scores is not None else None
            if counts is None:
                countable = False
            else:
                correct, labelled = correct + counts[0], labelled + counts[1]
    if not rows:
        raise TaskError(EMPTY)
    metrics = {"loss": total / rows}
    return {**metrics, "accuracy": correct / labelled} if countable and labelled else metrics


@contextlib.contextmanager
def eval_mode(model: torch.nn.Module) -> Iterator[None]:
    """Put `model` in eval mode without gradients; afterwards its mode and its buffers are what they were before.

    Raises TaskError for code that needs gradients.
    """
    modes = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    model.eval()
    try:
        with torch.no_grad():
            yield
    except RuntimeError as error:
        if NO_GRADIENT in str(error):
            raise TaskError(
                "gradients are off in an evaluation: compute what needs them under torch.enable_grad(); "
                f"{exception_with_place(error)}"
            ) from error
        raise
    finally:
        for module, training in modes:
            module.training = training
        with torch.no_grad():
            for module, name, buffer, value in buffers:
                if buffer.shape != value.shape:  # an observer of quantization allocates with its first batch
                    buffer.resize_(value.shape)
                buffer.copy_(value)
                if getattr(module, name) is not buffer:  # assigned to, not changed in place
                    setattr(module, name, buffer)


def count_correct(scores: Any, labels: Any, task: Task) -> tuple[int, int] | None:
    """Return how many `labels` have the highest score, and how many labels there are; None where that has no meaning.

    It has a meaning if `scores` are floating numbers with the classes in dimension 1, as `cross_entropy` takes them,
    and `labels` are integers of the shape of `scores` without dimension 1: (n, c) and (n), or (n, c, t) and (n, t).
    Labels of −100 do not count. Every other label must be a class, 0 to c − 1.

    If the last dimension could be the classes as well, which a square (n, t, t) does not show, only the default loss
    says which one it is.
    """
    if not (isinstance(scores, torch.Tensor) and isinstance(labels, torch.Tensor)):
        return None
    integers = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
    if not (scores.is_floating_point() and integers and scores.ndim >= 2 and scores.shape[1] > 1):
        return None
    if labels.shape != scores.shape[:1] + scores.shape[2:]:
        return None
    if scores.ndim > 2 and labels.shape == scores.shape[:-1] and type(task).loss is not Task.loss:
        return None
    counted = labels != IGNORED_LABEL
    if bool(((labels < 0) | (labels >= scores.shape[1]))[counted].any()):
        return None
    return int((scores.argmax(1) == labels)[counted].sum()), int(counted.sum())


def _loss_and_scores(task: Task, model: torch.nn.Module, batch: Any) -> tuple[torch.Tensor, Any]:
    """Return the batch's loss, and what `model(inputs)` returned; None if the loss did not call it once like that.

    The scores are those of the loss's own call. A second call would not know whether the loss scales or augments its
    inputs first.
    """
    if not (isinstance(batch, tuple | list) and len(batch) == 2):
        return task.loss(model, batch), None
    if isinstance(model, torch.jit.ScriptModule):  # takes no hook
        loss = task.loss(model, batch)
        return loss, model(batch[0]) if type(task).loss is Task.loss else None
    with _recorded(model) as calls:
        loss = task.loss(model, batch)
    if len(calls) == 1 and len(calls[0][0]) == 1 and calls[0][0][0] is batch[0] and not calls[0][1]:
        return loss, calls[0][2]
    return loss, None


@contextlib.contextmanager
def _recorded(model: torch.nn.Module) -> Iterator[list[tuple[tuple[Any, ...], dict[str, Any], Any]]]:
    """Record arguments, keyword arguments and result of each call of `model`."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any], Any]] = []
    record: Callable[..., None] = lambda _, args, kwargs, result: calls.append((args, kwargs, result))  # noqa: E731
    handle = model.register_forward_hook(record, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()
