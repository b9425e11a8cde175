"""FedAvg: the mean over one cohort, weighted by examples (McMahan et al., arXiv 1602.05629)."""

from __future__ import annotations

from fedqueue_coordinator.algorithms.aggregator import Aggregator
from fedqueue_coordinator.algorithms.fedbuff import fedbuff


def fedavg(cohort_size: int) -> Aggregator:
    """Algorithm 1 of the paper: Δ̄ = Σ n_i Δ_i / Σ n_i over one cohort, in which every update has the same base.

    This is FedBuff behind a barrier: every staleness is 0.
    """
    return fedbuff(cohort_size, lambda tau: 1.0, "count", weight_by_examples=True, name="fedavg")
