"""FADAS compared with the paper's formulas in float64, with results by hand, and with betas of 0."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fedqueue.config.aggregation import ServerOptimizerConfig
from fedqueue.errors import ConfigurationError
from fedqueue.tensors.frame import Frame
from fedqueue_coordinator.algorithms.aggregator import Accumulator, Aggregator, Contribution
from fedqueue_coordinator.algorithms.registry import make_aggregator
from fedqueue_coordinator.algorithms.server_optimizer import ServerOptimizer
from tests.support import oracle
from tests.support.builders import make_config, make_frame


def fadas(buffer_size: int = 2, **options: Any) -> Aggregator:
    return make_aggregator(
        make_config(aggregation={"strategy": "fadas", "buffer_size": buffer_size, "strategy_options": options})
    )


def merge(aggregator: Aggregator, accumulator: Accumulator, model: Frame, *contributions: Contribution) -> None:
    for contribution in contributions:
        aggregator.add(accumulator, contribution, model)
    ServerOptimizer(ServerOptimizerConfig(), model).step(aggregator.finish(accumulator, model))
    accumulator.clear()


@pytest.mark.parametrize("threshold", [1, 5, 100])
def test_fadas_follows_the_formulas_over_several_versions(threshold: int) -> None:
    options = {"learning_rate": 0.3, "betas": (0.8, 0.95), "eps": 1e-3, "delay_threshold": threshold}
    aggregator, model = fadas(3, **options), make_frame([0.5, -2.0])
    accumulator, x = aggregator.init(model.manifest), np.array([0.5, -2.0])
    exact = oracle.FADAS(0.3, (0.8, 0.95), 1e-3, threshold)
    rng = np.random.default_rng(1)
    for version in range(8):
        deltas = [rng.normal(size=2).astype(np.float32).astype(np.float64) for _ in range(3)]
        taus = [0, version, 2 * version]
        updates = [Contribution(make_frame(d), 10, t) for d, t in zip(deltas, taus, strict=True)]
        merge(aggregator, accumulator, model, *updates)
        x = exact.step(x, deltas, taus)
        np.testing.assert_allclose(model.parameters.numpy(), x, rtol=1e-5, atol=1e-6)


def test_first_step_by_hand() -> None:
    """m = 0.1 · 3, v̂ = 0.01 · 9 with the paper's betas: 0.01 · 0.3 / 0.3, without bias correction."""
    aggregator, model = fadas(1), make_frame(0.0)
    merge(aggregator, aggregator.init(model.manifest), model, Contribution(make_frame(3.0), 10, 0))
    assert model.parameters.tolist() == pytest.approx([0.01, 0.01], rel=1e-5)


@pytest.mark.parametrize(
    ("rule", "tau", "expected"),
    [("bound", 5, 0.5), ("bound", 10, 0.1), ("divide", 5, 0.5), ("divide", 10, 0.05)],
)
def test_rate_falls_with_the_longest_delay_over_the_threshold(rule: str, tau: int, expected: float) -> None:
    """η = 0.5 and τ_c = 5; m / √v̂ = 1 where β₁ = β₂ = 0. The fresh update in the buffer changes nothing."""
    options = {"learning_rate": 0.5, "betas": (0.0, 0.0), "delay_threshold": 5, "delay_rule": rule}
    aggregator, model = fadas(2, **options), make_frame(0.0)
    updates = [Contribution(make_frame(4.0), 10, t) for t in (tau, 0)]
    merge(aggregator, aggregator.init(model.manifest), model, *updates)
    assert model.parameters[0].item() == pytest.approx(expected, rel=1e-6)


def test_second_moment_never_falls() -> None:
    """AMSGrad differs from Adam: after one large delta, all later steps stay small."""
    aggregator, model = fadas(1, betas=(0.0, 0.0), learning_rate=1.0), make_frame(0.0)
    accumulator = aggregator.init(model.manifest)
    steps = []
    for delta in (100.0, 1.0, 1.0):
        before = model.parameters[0].item()
        merge(aggregator, accumulator, model, Contribution(make_frame(delta), 10, 0))
        steps.append(model.parameters[0].item() - before)
    assert steps == pytest.approx([1.0, 0.01, 0.01], rel=1e-4)


def test_fadas_with_zero_betas_steps_by_the_sign_of_the_mean() -> None:
    aggregator, model = fadas(2, betas=(0.0, 0.0), learning_rate=1.0), make_frame(0.0)
    updates = [Contribution(make_frame([3.0, -2.0]), 10, 0), Contribution(make_frame([-1.0, 1.0]), 10, 0)]
    merge(aggregator, aggregator.init(model.manifest), model, *updates)
    assert model.parameters.tolist() == pytest.approx([1.0, -1.0])


def test_step_does_not_depend_on_the_scale_of_the_deltas() -> None:
    models = []
    for scale in (1.0, 2.0**10):
        aggregator, model = fadas(2, eps=1e-30), make_frame(0.0)
        accumulator = aggregator.init(model.manifest)
        for deltas in ([1.0, -3.0], [0.5, 0.25]):
            merge(aggregator, accumulator, model, *[Contribution(make_frame(scale * d), 10, 0) for d in deltas])
        models.append(model.parameters.clone())
    torch.testing.assert_close(*models, rtol=1e-6, atol=0)


def test_fadas_has_three_state_vectors_and_equal_weights() -> None:
    aggregator, model = fadas(2), make_frame(0.0)
    accumulator = aggregator.init(model.manifest)
    weights = [aggregator.add(accumulator, Contribution(make_frame(1.0), n, t), model) for n, t in ((1, 0), (9, 7))]
    aggregator.finish(accumulator, model)
    assert weights == [1.0, 1.0]
    assert {name: tuple(value.shape) for name, value in accumulator.state.items()} == dict.fromkeys(
        ("m", "v", "v_max"), (2,)
    )


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"learning_rate": 0}, "learning_rate and eps must be positive"),
        ({"betas": (0.9, 1.0)}, "betas must be from 0 to below 1"),
        ({"betas": [0.9]}, "out of range"),
        ({"delay_threshold": 0}, "delay_threshold must be at least 1"),
        ({"delay_rule": "halve"}, "known: bound, divide"),
        ({"momentum": 0.9}, "unexpected keyword argument 'momentum'"),
    ],
)
def test_unaccepted_option_is_named(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigurationError, match=says) as caught:
        fadas(**options)
    assert caught.value.key == "aggregation.strategy_options"
