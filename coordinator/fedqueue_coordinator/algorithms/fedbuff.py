"""FedBuff: the weighted mean of a buffer of K updates makes a version (Nguyen et al., arXiv 2106.06639)."""

from __future__ import annotations

from typing import Literal

from fedqueue.staleness import Staleness
from fedqueue.tensors.frame import Frame
from fedqueue_coordinator.algorithms.aggregator import (
    Accumulator,
    Aggregator,
    Contribution,
    Step,
    accumulate,
    mean_step,
)


def fedbuff(
    buffer_size: int,
    staleness: Staleness,
    normalize: Literal["count", "weights"] = "count",
    weight_by_examples: bool = False,
    name: str = "fedbuff",
) -> Aggregator:
    """Algorithm 1 of the paper: Δ̄ = (1/K) Σ s(τ_i) Δ_i over the K updates of the buffer.

    The weight w_i is s(τ_i), times n_i with `weight_by_examples`. The divisor is K (or Σ n_i), so that staleness
    shrinks the step. With `normalize = "weights"` the divisor is Σ w_i, so that staleness only shifts weight among
    the updates.

    >>> import fedqueue
    >>> fedqueue.fedbuff(buffer_size=4, staleness=lambda tau: 1 / (1 + tau))
    Aggregator(name='fedbuff', buffer_size=4, needs_base=False, takes_pieces=True)
    """

    def add(acc: Accumulator, update: Contribution, model: Frame) -> float:
        weight = staleness(update.staleness) * (update.examples if weight_by_examples else 1)
        accumulate(acc, update, weight)
        return weight

    def finish(acc: Accumulator, model: Frame) -> Step:
        if normalize == "weights":
            return mean_step(acc, model, acc.weights)
        return mean_step(acc, model, float(acc.examples if weight_by_examples else acc.updates))

    return Aggregator(name, buffer_size, add, finish, takes_pieces=True)
