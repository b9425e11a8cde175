"""Merging of BatchNorm's running statistics, which the papers on asynchronous training do not specify.

In every algorithm, a client's values b_i enter the version as x_B ← x_B + Σ w_i (b_i − x_B) / divisor. The
configuration chooses b_i for a stale update:

    mean     b_i = local_i                     a convex combination: a variance stays positive
    drift    b_i = local_i + (x_B − base_B)    the client's change is added: x_B + Σ w_i Δ_i / divisor, as for
                                               parameters; a variance may fall below 0
    frozen   b_i = x_B                         the model keeps the statistics of version 0
"""

from __future__ import annotations

from dataclasses import replace

from fedqueue.config.aggregation import RunningStatistics
from fedqueue.tensors.frame import Frame
from fedqueue_coordinator.algorithms.aggregator import Accumulator, Aggregator, Contribution, Step


def with_running_statistics(aggregator: Aggregator, choice: RunningStatistics) -> Aggregator:
    """Return `aggregator` with `choice` applied; `drift` needs the base versions of stale updates."""
    match choice:
        case "mean":
            return aggregator
        case "drift":
            return _with_drift(aggregator)
        case "frozen":
            return _frozen(aggregator)


def _with_drift(aggregator: Aggregator) -> Aggregator:
    def add(acc: Accumulator, update: Contribution, model: Frame) -> float:
        if update.staleness > 0:
            assert update.base is not None
            # In place: nothing reads the client's own values after this.
            update.delta.buffers.add_(model.buffers).sub_(update.base.buffers)
        return aggregator.add(acc, update, model)

    return replace(aggregator, add=add, needs_base=True)


def _frozen(aggregator: Aggregator) -> Aggregator:
    def finish(acc: Accumulator, model: Frame) -> Step:
        return replace(aggregator.finish(acc, model), buffers=model.buffers)

    return replace(aggregator, finish=finish)
