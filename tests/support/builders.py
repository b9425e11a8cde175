"""Build configurations, frames and update headers, by default for a model small enough to check by hand."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from fedqueue.config.loading import parse_config
from fedqueue.config.schema import Config
from fedqueue.protocol.messages import Update
from fedqueue.tensors.blobs import chunks_of
from fedqueue.tensors.frame import Frame
from fedqueue.tensors.manifest import BUFFER, COUNTER, PARAMETER, Manifest, TensorSpec

MANIFEST = Manifest(
    (
        TensorSpec("weight", "float32", (2,), 0, 2, PARAMETER),
        TensorSpec("running_mean", "float32", (1,), 2, 1, BUFFER),
        TensorSpec("running_var", "float32", (1,), 3, 1, BUFFER),
        TensorSpec("steps", "int64", (), 0, 1, COUNTER),
    )
)
EXAMPLES = 10
"""What each client registers."""

A = TypeVar("A")


def make_config(**sections: Any) -> Config:
    """Make a configuration without a stop condition; each section is a dictionary.

    The default aggregation adds each update unscaled: x ← x + Δ.
    """
    tree: dict[str, Any] = {
        "task": {"entrypoint": "task.py:Task"},
        "clients": {"count": 4},
        "aggregation": {"strategy": "fedasync", "alpha": 1.0, "mixing": "delta", "staleness": {"function": "constant"}},
        "stop": {"versions": 10_000},
    }
    return parse_config({**tree, **sections})


def make_frame(parameters: npt.ArrayLike = 0.0, mean: float = 0.0, variance: float = 1.0, steps: int = 0) -> Frame:
    """Make a model or an update; for an update, `parameters` is the delta and the other values are the client's own."""
    frame = Frame(MANIFEST)
    frame.parameters[:] = frame.parameters.new_tensor(np.broadcast_to(np.asarray(parameters, np.float32), 2))
    frame.buffers[0], frame.buffers[1] = mean, variance
    frame.counters[0] = steps
    return frame


def make_update(nbytes: int = MANIFEST.nbytes, **fields: Any) -> Update:
    """Make the header of an update with a payload of `nbytes` bytes (default: the size of the small model)."""
    described = {"examples": EXAMPLES, "nbytes": nbytes, "chunks": chunks_of(nbytes), "seconds": 0.5}
    return Update(**{**described, **fields})


def make_header(**fields: Any) -> bytes:
    """Make the packed header of an update of the small model."""
    return make_update(**{"chunks": 1, **fields}).pack()


def constant_frame(manifest: Manifest, value: float = 1.0) -> Frame:
    """Make a frame with `value` in all parameters and buffers, and 0 in all counters."""
    frame = Frame(manifest)
    frame.floats.fill_(value)
    return frame


def frame_of_module(module: torch.nn.Module) -> Frame:
    """Copy the module's tensors into a new frame."""
    frame = Frame(Manifest.from_module(module))
    frame.read(module)
    return frame


def of_kind(actions: Iterable[Any], kind: type[A]) -> list[A]:
    return [action for action in actions if isinstance(action, kind)]


def same_bits(first: Frame, second: Frame) -> bool:
    return np.array_equal(first.buffer, second.buffer)
