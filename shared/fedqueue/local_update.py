"""Trains one job: a worker process and the simulation share this code, so their updates are bitwise equal."""

from __future__ import annotations

import math
import time
from typing import Any

import torch

from fedqueue.protocol.messages import MAX_METRICS, Order, Update
from fedqueue.task import Progress, Task, TrainResult
from fedqueue.tensors.blobs import chunks_of
from fedqueue.tensors.frame import Frame
from fedqueue.training import set_seed


def compute_update(
    task: Task, model: torch.nn.Module, data: Any, order: Order, base: Frame, local: Frame, progress: Progress
) -> Update:
    """Train `model` on `data` from `base` as the order says; fills `local` with the update and returns its header.

    The bits depend on the order, the base and the data only, because the order's seed is set before the training.
    Exceptions of the task and of `progress` propagate.
    """
    started = time.perf_counter()
    base.write(model)
    set_seed(order.seed)
    fit = task.fit(model, data, order.training, progress)
    seconds = time.perf_counter() - started

    local.read_update(model, base)
    payload = local.buffer
    return Update(
        examples=int(fit.num_examples),  # a task may count with numpy
        nbytes=payload.nbytes,
        chunks=chunks_of(payload.nbytes),
        metrics=reportable_metrics(fit),
        seconds=seconds,
    )


def reportable_metrics(fit: TrainResult) -> dict[str, float]:
    """The metrics that an update may contain: finite numbers, names of at most 64 characters, MAX_METRICS at most."""
    pairs = ((str(name)[:64], float(value)) for name, value in fit.metrics.items())
    return dict([(name, value) for name, value in pairs if math.isfinite(value)][:MAX_METRICS])
