"""What becomes of BatchNorm's running statistics, which the papers on asynchronous training leave open.

Whatever the algorithm, a client's values b_i enter the version as x_B ← x_B + Σ w_i (b_i − x_B) / divisor. The choice
is what b_i is, for an update that is stale:

    mean     b_i = local_i                     a convex combination: a variance stays positive
    drift    b_i = local_i + (x_B − base_B)    what the client changed, added to the present: x_B + Σ w_i Δ_i / divisor,
                                               as for parameters; a sum of differences, so a variance may fall below 0
    frozen   b_i = x_B                         the model keeps those of version 0, and clients start from them
"""

from __future__ import annotations

from dataclasses import replace

from fedqueue.config.aggregation import RunningStatistics
from fedqueue.tensors.frame import Frame
from fedqueue_coordinator.algorithms.aggregator import Accumulator, Aggregator, Contribution, Step


def with_running_statistics(aggregator: Aggregator, choice: RunningStatistics) -> Aggregator:
    """`aggregator`, with that choice; `drift` needs the base versions of stale updates."""
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
            # In place: from here on the update belongs to its version, and nobody asks for the client's own values.
            update.delta.buffers.add_(model.buffers).sub_(update.base.buffers)
        return aggregator.add(acc, update, model)

    return replace(aggregator, add=add, needs_base=True)


def _frozen(aggregator: Aggregator) -> Aggregator:
    def finish(acc: Accumulator, model: Frame) -> Step:
        return replace(aggregator.finish(acc, model), buffers=model.buffers)

    return replace(aggregator, finish=finish)
