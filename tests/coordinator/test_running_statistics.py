"""Merging BatchNorm's running statistics: mean and drift."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fedqueue.config.aggregation import ServerOptimizerConfig
from fedqueue.tensors.frame import Frame
from fedqueue_coordinator.algorithms.aggregator import Contribution
from fedqueue_coordinator.algorithms.registry import make_aggregator
from fedqueue_coordinator.algorithms.server_optimizer import ServerOptimizer
from tests.support.builders import make_config, make_frame, same_bits
from tests.support.federation_run import start


def merge(choice: str, model: Frame, *contributions: Contribution, **aggregation: Any) -> Frame:
    settings = {"strategy": "fedbuff", "buffer_size": len(contributions), "running_statistics": choice, **aggregation}
    aggregator = make_aggregator(make_config(aggregation=settings))
    accumulator = aggregator.init(model.manifest)
    for contribution in contributions:
        aggregator.add(accumulator, contribution, model)
    ServerOptimizer(ServerOptimizerConfig(), model).step(aggregator.finish(accumulator, model))
    return model


def stale(
    mean: float, variance: float, base_mean: float, base_variance: float, staleness: int, examples: int = 10
) -> Contribution:
    return Contribution(
        make_frame(mean=mean, variance=variance),
        examples,
        staleness,
        base=make_frame(mean=base_mean, variance=base_variance),
    )


@pytest.mark.parametrize("normalize", ["count", "weights"])
def test_drift_adds_the_weighted_mean_of_the_changes(normalize: str) -> None:
    """The float64 reference is x_B + Σ w_i (local_i − base_i) / divisor, with w = (1 + τ)^−½."""
    updates = [stale(5.0, 2.0, 4.0, 1.5, 3), stale(7.0, 9.0, 9.0, 8.0, 8)]
    model = merge("drift", make_frame(mean=10.0, variance=20.0), *updates, normalize=normalize)
    weights = np.array([0.5, 1 / 3])
    changes = np.array([[1.0, 0.5], [-2.0, 1.0]])
    divisor = weights.sum() if normalize == "weights" else 2
    assert model.buffers.tolist() == pytest.approx(np.array([10.0, 20.0]) + weights @ changes / divisor, rel=1e-6)


def test_mean_averages_values_and_drift_averages_changes() -> None:
    drift, mean = (
        merge(choice, make_frame(mean=10.0, variance=20.0), stale(5.0, 2.0, 5.0, 2.0, staleness=3))
        for choice in ("drift", "mean")
    )
    assert drift.buffers.tolist() == [10.0, 20.0]  # the client changed nothing
    assert mean.buffers.tolist() == [7.5, 11.0]


def test_fresh_updates_give_the_same_bits_by_mean_and_by_drift() -> None:
    fresh = [Contribution(make_frame(mean=m, variance=v), 10, 0) for m, v in ((0.1, 0.3), (0.7, 1.9))]
    models = [merge(choice, make_frame(mean=1e8, variance=0.2), *fresh) for choice in ("mean", "drift")]
    assert same_bits(*models)


def test_drift_can_make_a_variance_negative_as_documented() -> None:
    update = stale(0.0, 1.0, 0.0, 9.0, staleness=1)
    model = merge("drift", make_frame(variance=2.0), update, staleness={"function": "constant"})
    assert model.buffers[1].item() == -6.0


def test_robust_drift_applies_the_rule_to_shifted_values() -> None:
    updates = [stale(float(m), 1.0, 0.0, 1.0, staleness=1) for m in (1, 2, 300)]
    settings = {"robust": {"rule": "median"}, "staleness": {"function": "constant"}}
    model = merge("drift", make_frame(mean=10.0), *updates, **settings)
    assert model.buffers[0].item() == 12.0


@pytest.mark.parametrize(("choice", "kept"), [("mean", False), ("drift", True), ("frozen", False)])
def test_base_versions_stay_stored_for_drift(choice: str, kept: bool) -> None:
    config = make_config(aggregation={"strategy": "fedbuff", "buffer_size": 2, "running_statistics": choice})
    assert config.keeps_bases is kept
    assert make_aggregator(config).needs_base is kept


def test_drift_uses_the_base_of_a_stale_update() -> None:
    settings = {"strategy": "fedasync", "alpha": 1.0, "mixing": "delta", "running_statistics": "drift"}
    run = start("a", "b", model=make_frame(mean=10.0), aggregation={**settings, "staleness": {"function": "constant"}})
    run.post("a", make_frame(mean=14.0), base=0)
    run.post("b", make_frame(mean=11.0), base=0)
    assert run.federation.model.buffers[0].item() == 15.0  # both changes are relative to version 0's 10
