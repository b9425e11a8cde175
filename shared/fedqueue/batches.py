"""Batches of any kind: tensors, and tuples, lists, mappings, dataclasses and objects with tensors inside."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from typing import Any

import torch


def to_device(batch: Any, device: torch.device) -> Any:
    """Return `batch` with every tensor inside on `device`; values that hold no tensor stay as they are.

    A container keeps its type: a named tuple, an `OrderedDict` or a `ModelOutput` of Hugging Face stays one. An object
    with a method `to(device)` of its own, such as a `BatchEncoding` or a `PackedSequence`, is moved by that method.
    """
    if not isinstance(batch, type) and callable(getattr(batch, "to", None)):
        return batch.to(device)
    if isinstance(batch, Mapping):
        moved = {key: to_device(value, device) for key, value in batch.items()}
        return _refilled(batch, moved)
    if isinstance(batch, tuple | list):
        parts = [to_device(part, device) for part in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        clone: Any = copy.copy(batch)
        for field in dataclasses.fields(batch):
            object.__setattr__(clone, field.name, to_device(getattr(batch, field.name), device))
        return clone
    return batch


def stack_batches(batches: Sequence[Any]) -> Any:
    """Return batches of one structure as one, whose tensors have the batches in a new first dimension.

    Tensors, and tuples, lists and mappings of them, are stacked. Raises TypeError for anything else, and RuntimeError
    for tensors of different shapes.
    """
    first = batches[0]
    if isinstance(first, torch.Tensor):
        return torch.stack(list(batches))
    if isinstance(first, Mapping):
        return {key: stack_batches([batch[key] for batch in batches]) for key in first}
    if isinstance(first, tuple | list):
        parts = [stack_batches(part) for part in zip(*batches, strict=True)]
        return type(first)(*parts) if hasattr(first, "_fields") else type(first)(parts)
    raise TypeError(f"{type(first).__name__} cannot be stacked")


def _refilled(batch: Mapping[Any, Any], content: dict[Any, Any]) -> Mapping[Any, Any]:
    """A mapping of the type of `batch` with this content; a dict if that type cannot be changed."""
    if type(batch) is dict or not isinstance(batch, MutableMapping):
        return content
    clone = copy.copy(batch)
    for key, value in content.items():  # not `update`, which ModelOutput refuses
        clone[key] = value
    return clone


def rows_in(batch: Any) -> int:
    """Return the number of rows of `batch`: the length of the first tensor inside that has one, or else 1."""
    return next((len(tensor) for tensor in _tensors(batch) if tensor.ndim), 1)


def _tensors(batch: Any) -> Iterable[torch.Tensor]:
    if isinstance(batch, torch.Tensor):
        yield batch
        return
    if isinstance(batch, Mapping):
        parts: Iterable[Any] = batch.values()
    elif isinstance(batch, tuple | list):
        parts = batch
    elif dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        parts = vars(batch).values()
    else:
        return
    for part in parts:
        yield from _tensors(part)
