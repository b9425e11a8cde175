"""What training a job comes to, wherever it runs: a worker process and the virtual clock do the same to the bit."""

from __future__ import annotations

import math
import time
from typing import Any

import torch

from fedqueue.protocol.messages import MAX_METRICS, Order, Update
from fedqueue.task import Progress, Task, TrainResult
from fedqueue.tensors.frame import Frame, make_update
from fedqueue.training import set_seed
from fedqueue.transport.store import chunks_of


def compute_update(
    task: Task, model: torch.nn.Module, data: Any, order: Order, base: Frame, local: Frame, progress: Progress
) -> Update:
    """Train the order from `base`: `local` becomes the update's frame, and the answer is its header.

    Nothing but the order, the base and the data decides the bits: the order's seed is set before the training.
    Whatever the task or `progress` raises goes through.
    """
    started = time.perf_counter()
    base.write(model)
    set_seed(order.seed)
    fit = task.fit(model, data, order.training, progress)
    seconds = time.perf_counter() - started

    local.read(model)
    payload = make_update(local, base).buffer
    return Update(
        examples=int(fit.num_examples),  # a task may count with numpy
        nbytes=payload.nbytes,
        chunks=chunks_of(payload.nbytes),
        metrics=reportable_metrics(fit),
        seconds=seconds,
    )


def reportable_metrics(fit: TrainResult) -> dict[str, float]:
    """The metrics that may leave: plain finite numbers under short names, at most MAX_METRICS of them."""
    pairs = ((str(name)[:64], float(value)) for name, value in fit.metrics.items())
    return dict([(name, value) for name, value in pairs if math.isfinite(value)][:MAX_METRICS])
