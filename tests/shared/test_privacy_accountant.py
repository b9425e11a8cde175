"""What steps with noise cost: RDP of the subsampled Gaussian, its conversion to ε, and sums of it."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fedqueue.config.privacy import ExamplePrivacyConfig
from fedqueue.config.training import TrainingConfig
from fedqueue.errors import ConfigurationError
from fedqueue.privacy.accountant import ORDERS, epsilon_of, noise_multiplier_for, step_rdp
from fedqueue.privacy.spending import Charge, Spending, charge_of_job, jobs_within

# (q, z, steps, δ, ε): computed by dp-accounting 0.6.0, RdpAccountant with the orders of ORDERS, in an environment of
# its own: it would bring dm-tree, absl and a bound attrs < 24 into this one.
DP_ACCOUNTING = [
    (0.1, 1.05, 200, 0.0005, 8.112003039),
    (0.1, 4.5, 200, 0.0005, 1.0061148),
    (0.064, 1.7, 300, 0.0001, 3.020899915),
    (0.0426, 0.91, 470, 1.6e-05, 8.075277476),
    (1.0, 5.0, 10, 1e-05, 2.814109168),
    (0.01, 0.5, 100, 1e-05, 10.661181335),
    (0.5, 20.0, 1000, 1e-06, 4.020535039),
    (0.001, 0.3, 1, 0.001, 5.586227065),
    (0.3, 1.0, 1, 0.01, 1.391150427),
]


@pytest.mark.parametrize(("rate", "noise", "steps", "delta", "epsilon"), DP_ACCOUNTING)
def test_epsilon_is_that_of_dp_accounting(rate: float, noise: float, steps: int, delta: float, epsilon: float) -> None:
    assert epsilon_of(steps * step_rdp(rate, noise), delta) == pytest.approx(epsilon, rel=1e-8)
    assert Spending().plus("run", Charge(rate, noise, steps)).epsilon(delta) == pytest.approx(epsilon, rel=1e-8)


@pytest.mark.parametrize("order", [2, 3, 8, 20])
@pytest.mark.parametrize(("rate", "noise"), [(0.2, 0.8), (0.05, 2.0), (1.0, 3.0)])
def test_rdp_is_the_integral_of_the_mixture(order: int, rate: float, noise: float) -> None:
    """The definition, on a grid: D_α of (1 − q) N(0, z²) + q N(1, z²) from N(0, z²)."""
    x = np.linspace(-40 * noise, 40 * noise + order, 400_001)
    log_ratio = np.logaddexp(
        math.log1p(-rate) if rate < 1 else -np.inf, math.log(rate) + (2 * x - 1) / (2 * noise**2)
    )  # fmt: skip
    log_density = -(x**2) / (2 * noise**2) - math.log(noise * math.sqrt(2 * math.pi))
    moment = np.trapezoid(np.exp(log_density + order * log_ratio), x)
    found = step_rdp(rate, noise)[list(ORDERS).index(order)]
    assert found == pytest.approx(math.log(moment) / (order - 1), rel=1e-6)


@pytest.mark.parametrize(("rate", "noise", "steps"), [(0.2, 1.0, 1), (1.0, 2.0, 3), (0.1, 0.8, 1)])
def test_hockey_stick_never_exceeds_delta(rate: float, noise: float, steps: int) -> None:
    """The divergence at the claimed ε, by integration (steps without sampling are one with z / √steps)."""
    delta = 1e-3
    epsilon = epsilon_of(steps * step_rdp(rate, noise), delta)
    noise /= math.sqrt(steps)
    x = np.linspace(-30 * noise, 30 * noise + 1, 1_000_001)
    base = np.exp(-(x**2) / (2 * noise**2)) / (noise * math.sqrt(2 * math.pi))
    mixed = base * (1 - rate + rate * np.exp((2 * x - 1) / (2 * noise**2)))
    for one, other in ((mixed, base), (base, mixed)):
        assert np.trapezoid(np.maximum(one - math.exp(epsilon) * other, 0.0), x) <= delta


def test_larger_rate_and_smaller_noise_cost_more() -> None:
    assert (step_rdp(0.2, 1.0) > step_rdp(0.1, 1.0)).all()
    assert (step_rdp(0.1, 0.9) > step_rdp(0.1, 1.0)).all()
    assert (step_rdp(0.999999, 1.0) <= step_rdp(1.0, 1.0)).all()
    assert step_rdp(0.1, 1e-3).max() > 1e5, "no overflow"
    assert (step_rdp(1e-6, 50.0) > 0).all(), "no cancellation"


@pytest.mark.parametrize("epsilon", [0.5, 1.0, 3.0, 8.0, 40.0])
def test_noise_is_the_smallest_that_keeps_to_epsilon(epsilon: float) -> None:
    noise = noise_multiplier_for(epsilon, 1e-4, 0.1, 300)
    assert epsilon_of(300 * step_rdp(0.1, noise), 1e-4) <= epsilon
    assert epsilon_of(300 * step_rdp(0.1, noise * 0.999), 1e-4) > epsilon


def test_spending_adds_up_over_runs_rates_and_noises() -> None:
    first, second = Charge(0.1, 1.0, 20), Charge(0.2, 2.0, 5)
    spent = Spending().plus("a", first).plus("b", second).plus("a", first, jobs=2)
    assert [(e.run, e.steps, e.jobs) for e in sorted(spent.entries, key=lambda e: e.run)] == [("a", 60, 3), ("b", 5, 1)]
    assert spent.jobs == 4
    assert spent.epsilon(1e-5) == epsilon_of(60 * step_rdp(0.1, 1.0) + 5 * step_rdp(0.2, 2.0), 1e-5)
    assert spent.of_run("b").epsilon(1e-5) == epsilon_of(5 * step_rdp(0.2, 2.0), 1e-5)
    assert Spending().epsilon(1e-5) == 0


@pytest.mark.parametrize(
    ("training", "rate", "steps"),
    [
        ({"batch_size": 20, "local_epochs": 2}, 0.1, 20),
        ({"batch_size": 30, "local_epochs": 1}, 0.15, 7),
        ({"batch_size": 20, "local_steps": 3}, 0.1, 3),
        ({"batch_size": 500, "local_epochs": 2}, 1.0, 2),
    ],
)
def test_job_samples_a_batch_of_its_rows_in_each_step(training: dict[str, int], rate: float, steps: int) -> None:
    privacy = ExamplePrivacyConfig(max_grad_norm=1.0, noise_multiplier=1.5, delta=1e-5)
    assert charge_of_job(privacy, TrainingConfig(**training), 200) == Charge(rate, 1.5, steps)


def test_epsilon_gives_the_noise_for_its_number_of_jobs() -> None:
    privacy = ExamplePrivacyConfig(max_grad_norm=1.0, epsilon=3.0, jobs=10, delta=1e-5)
    charge = charge_of_job(privacy, TrainingConfig(batch_size=20), 200)
    assert jobs_within(charge, 3.0, 1e-5) == 10
    assert jobs_within(charge, 3.0, 1e-5, Spending().plus("", charge, 7)) == 3
    assert jobs_within(charge, 0.01, 1e-5) == 0


def test_epsilon_that_no_noise_reaches_is_an_error() -> None:
    privacy = ExamplePrivacyConfig(max_grad_norm=1.0, epsilon=1e-6, jobs=10, delta=1e-5)
    with pytest.raises(ConfigurationError, match=r"privacy.examples.epsilon = 1e-06: no noise multiplier"):
        charge_of_job(privacy, TrainingConfig(), 200)
