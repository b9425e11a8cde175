"""FedAsync: every update makes a version (Xie et al., arXiv 1903.03934)."""

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


def fedasync(alpha: float, staleness: Staleness, mixing: Literal["model", "delta"]) -> Aggregator:
    """Algorithm 1 of the paper: x ← (1 − α_t) x + α_t x_local, with α_t = α · s(τ).

    As a pseudo-delta: Δ̄ = α_t (x_b + Δ − x). `mixing = "delta"` omits the drift x_b − x: Δ̄ = α_t Δ.
    α is constant during a run; s(τ) applies to one update and never accumulates.
    """

    def add(acc: Accumulator, update: Contribution, model: Frame) -> float:
        weight = alpha * staleness(update.staleness)
        accumulate(acc, update, weight)
        if mixing == "model" and update.staleness > 0:
            assert update.base is not None
            parameters = acc.floats[: len(model.parameters)]
            parameters.add_(update.base.parameters, alpha=weight).sub_(model.parameters, alpha=weight)
        return weight

    def finish(acc: Accumulator, model: Frame) -> Step:
        return mean_step(acc, model, divisor=1.0)

    return Aggregator("fedasync", 1, add, finish, needs_base=mixing == "model", takes_pieces=True)
