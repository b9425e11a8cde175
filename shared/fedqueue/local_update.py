"""Trains one job: a worker process and the simulation share this code, so their updates are bitwise equal."""

from __future__ import annotations

import contextlib
import threading
import time
import zlib
from collections.abc import Iterator
from numbers import Integral
from typing import Any

import structlog
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from fedqueue.config.client import Client
from fedqueue.errors import JobClosed, NoExamples, TaskError
from fedqueue.learning_rates import RateHolder
from fedqueue.local_model import LocalModel
from fedqueue.metrics import as_metrics
from fedqueue.privacy.spending import countable_rows
from fedqueue.private_training import PrivateJob
from fedqueue.protocol.messages import Order, Update
from fedqueue.task import Progress, Task, TrainResult
from fedqueue.tensors.blobs import chunks_of
from fedqueue.tensors.frame import Frame
from fedqueue.training import set_seed

log = structlog.get_logger("fedqueue.worker")


def load_data(task: Task, client: Client, seed: int) -> tuple[Any, int | None]:
    """Load a client's data; returns it with its number of examples, None for a stream without a length.

    The global random generators are seeded for the client from `seed`, the run's. So data that is drawn from them is
    the same wherever the client is served, and differs from client to client.

    Raises NoExamples for a client without examples. Exceptions of the task propagate.
    """
    set_seed((seed * 1_000_003 + zlib.crc32(client.id.encode())) % 2**53)
    data = task.train_data(client)
    examples = task.num_examples(data)
    if examples == 0:
        raise NoExamples(f"{client.id} has no examples: it does not take part")
    return data, None if examples is None else int(examples)  # a task may count with numpy


def compute_update(
    task: Task,
    model: LocalModel,
    data: Any,
    order: Order,
    base: Frame,
    local: Frame,
    progress: Progress,
    noise_key: bytes = b"",
) -> Update:
    """Train `model` on `data` from `base` as the order says; fills `local` with the update and returns its header.

    `progress` is what `model.progress` returned for this job. The bits depend on the order, the base and the data only,
    because the model is put back and the order's seed is set before the training; with `Task.stateful_clients` or
    `progress.memory` they depend on the client's earlier jobs, too.

    Where the order protects rows, the update also depends on `noise_key`, 32 secret bytes of this job only, and its
    header has no metrics.

    Raises TaskError where `fit` returns something else than a TrainResult or a number of examples, or more examples
    than the client has, or where it changed the model without noise although the order protects rows. Exceptions of the
    task and of `progress` propagate.
    """
    started = time.perf_counter()
    model.begin(order.client)
    base.write(model.module)
    set_seed(order.seed)
    if order.privacy:
        rows = countable_rows(data)
        progress.private = PrivateJob(order.privacy, order.training, rows, noise_key, model.module)
    with _progress_after_steps(progress):
        returned = task.fit(model.module, data, order.training, progress)
    fit = _train_result(task, data, returned)
    if progress.private:
        progress.private.check(task, model.module)
        fit = TrainResult(task.num_examples(data) or fit.num_examples)  # metrics are about rows
    seconds = time.perf_counter() - started

    local.read_update(model.module, base)
    model.end(order.client)
    payload = local.buffer
    return Update(
        examples=fit.num_examples,
        nbytes=payload.nbytes,
        chunks=chunks_of(payload.nbytes),
        metrics=as_metrics(fit.metrics, "fit"),
        seconds=seconds,
    )


@contextlib.contextmanager
def _progress_after_steps(progress: Progress) -> Iterator[None]:
    """Report each step of any torch optimizer as progress, so that a `fit` that never calls `progress` is not lost.

    JobClosed ends the training only in the thread that `fit` runs in.
    """
    thread = threading.get_ident()

    def after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if isinstance(optimizer, RateHolder):
            return
        if threading.get_ident() == thread:
            progress.stepped()
        else:
            with contextlib.suppress(JobClosed):
                progress.stepped()

    handle = register_optimizer_step_post_hook(after_step)
    try:
        yield
    finally:
        handle.remove()


def _train_result(task: Task, data: Any, returned: Any) -> TrainResult:
    """What `fit` returned, checked; a number of examples alone is accepted."""
    fit = returned if isinstance(returned, TrainResult) else TrainResult(returned)
    count, name = fit.num_examples, f"{type(task).__name__}.fit"
    if not isinstance(count, Integral) or isinstance(count, bool) or count < 0:
        if isinstance(returned, TrainResult):
            raise TaskError(f"{name} returned num_examples = {count!r}: an integer from 0 on is expected")
        raise TaskError(
            f"{name} returned {_shown(returned)}: return fedqueue.TrainResult(num_examples=..., metrics={{...}})"
        )
    held = task.num_examples(data)
    if held is not None and count > held:
        raise TaskError(
            f"{name} returned more num_examples than the client has: count each example once, however often it was "
            "trained on"
        )
    return TrainResult(int(count), fit.metrics)


def _shown(returned: Any) -> str:
    return "None" if returned is None else f"a {type(returned).__name__}"
