"""The first and the last linear layer of a model, which the attacks on labels and rows read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from fedqueue.evaluation import eval_mode
from fedqueue.leak.row_data import Rows
from fedqueue.task import Task


@dataclass(frozen=True)
class Layer:
    """The name of a linear layer with a bias, or why the attack on it is not applicable."""

    name: str = ""
    problem: str = ""


def first_and_last(task: Task, model: torch.nn.Module, rows: Rows) -> tuple[Layer, Layer]:
    """Return the layer that reads a row, and the one that gives the scores of the classes.

    One row is passed through `task.loss`; the layers are the first and the last module with parameters of its own that
    is called. The first must take the whole row as a vector, the last must have an output for each class.
    """
    if rows.inputs is None or rows.labels is None:
        both = Layer(problem="a row is no pair of a floating tensor and an integer label")
        return both, both
    calls = _calls(task, model, rows.batches[0])
    if not calls:
        both = Layer(problem="the model has no layer with parameters")
        return both, both
    names = {id(module): name for name, module in model.named_modules()}
    (first, given), (last, _) = calls[0], calls[-1]
    width, classes = rows.inputs[0].numel(), int(rows.labels.max()) + 1
    problem = _not_linear("first", first)
    if not problem and given != (1, width):
        problem = "the first layer does not read the row as it is"
    first_layer = Layer(problem=problem) if problem else Layer(names[id(first)])
    problem = _not_linear("last", last)
    if not problem and (int(rows.labels.min()) < 0 or last.out_features < max(classes, 2)):
        problem = "the last layer has no output for each class"
    return first_layer, Layer(problem=problem) if problem else Layer(names[id(last)])


def _not_linear(which: str, module: Any) -> str:
    if not isinstance(module, torch.nn.Linear):
        return f"the {which} layer is {type(module).__name__}, not Linear"
    return "" if module.bias is not None else f"the {which} layer has no bias"


def _calls(task: Task, model: torch.nn.Module, batch: Any) -> list[tuple[Any, tuple[int, ...]]]:
    """Return each call of a module with parameters of its own, in order, with the shape of its first argument."""
    calls: list[tuple[Any, tuple[int, ...]]] = []

    def note(module: torch.nn.Module, arguments: tuple[Any, ...], result: Any) -> None:
        shape = arguments[0].shape if arguments and isinstance(arguments[0], torch.Tensor) else ()
        calls.append((module, tuple(shape)))

    own = [module for module in model.modules() if next(module.parameters(recurse=False), None) is not None]
    handles = [module.register_forward_hook(note) for module in own]
    try:
        with eval_mode(model):
            task.loss(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return calls
