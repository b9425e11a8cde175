"""The closed form of Gaussian differential privacy: against integration, published figures, and its own inverses."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from fedqueue.privacy.gaussian_dp import (
    ClientBudget,
    gaussian_delta,
    gaussian_epsilon,
    gaussian_mu,
    noise_multiplier_of,
    participations_of,
)


@pytest.mark.parametrize("mu", [0.01, 0.1, 0.5, 1.0, 3.0, 20.0, 60.0])
@pytest.mark.parametrize("delta", [1e-3, 1e-5, 1e-9])
def test_epsilon_solves_the_hockey_stick(mu: float, delta: float) -> None:
    """δ by numerical integration of what N(μ, 1) exceeds e^ε N(0, 1) by."""
    epsilon = gaussian_epsilon(mu, delta)
    edge = epsilon / mu + mu / 2  # beyond it, the first density is the larger one
    x = np.linspace(edge, max(edge, mu) + 15, 400_001)
    gap = np.exp(stats.norm.logpdf(x, mu)) - np.exp(epsilon + stats.norm.logpdf(x))
    assert np.trapezoid(gap, x) == pytest.approx(delta, rel=1e-6)


@pytest.mark.parametrize(
    ("noise_multiplier", "releases", "epsilons"),
    [
        (1.0, 1, (4.37717810, 5.77609838)),
        (4.0, 20, (4.98330641, 6.54265104)),
        (0.5, 3, (20.12502355, 24.84777432)),
        (16.684, 20, (0.99999289, 1.39173187)),
    ],
)
def test_epsilon_is_that_of_dp_accounting(
    noise_multiplier: float, releases: int, epsilons: tuple[float, float]
) -> None:
    """By the privacy loss distributions of dp-accounting 0.6.0, which rounds ε up by about 10⁻⁴."""
    mu = math.sqrt(releases) / noise_multiplier
    for delta, epsilon in zip((1e-5, 1e-8), epsilons, strict=True):
        assert gaussian_epsilon(mu, delta) == pytest.approx(epsilon, rel=2e-3)


@pytest.mark.parametrize("epsilon", [0.0, 0.1, 1.0, 8.0, 100.0, 2000.0])
def test_mu_is_the_inverse_of_epsilon(epsilon: float) -> None:
    mu = gaussian_mu(epsilon, 1e-6)
    assert gaussian_epsilon(mu, 1e-6) <= epsilon * (1 + 1e-9)
    assert gaussian_delta(mu * (1 + 1e-9), epsilon) > 1e-6


def test_delta_of_no_mechanism_is_zero() -> None:
    assert gaussian_delta(0.0, 1.0) == 0.0
    assert gaussian_epsilon(0.0, 1e-5) == 0.0


def test_delta_of_extremes_is_finite() -> None:
    assert gaussian_delta(1e-3, 1.0) == 0.0
    assert gaussian_delta(1e4, 1.0) == pytest.approx(1.0)
    assert gaussian_epsilon(1e4, 1e-5) == pytest.approx(1e8 / 2 + 4.265e4, rel=1e-4)


def test_monte_carlo_likelihood_ratios_give_delta() -> None:
    """P[loss > ε] − e^ε P[−loss > ε], drawn."""
    draws = np.random.default_rng(1).normal(size=2_000_000)
    mu, epsilon = 1.2, 1.0
    loss, other = mu * (draws + mu) - mu**2 / 2, mu * draws - mu**2 / 2
    drawn = np.mean(loss > epsilon) - math.exp(epsilon) * np.mean(other > epsilon)
    assert drawn == pytest.approx(gaussian_delta(mu, epsilon), rel=2e-2)


@pytest.mark.parametrize("participations", [1, 5, 20, 1000])
@pytest.mark.parametrize("epsilon", [0.3, 3.0, 8.0])
def test_noise_multiplier_pays_for_just_its_participations(epsilon: float, participations: int) -> None:
    noise_multiplier = noise_multiplier_of(epsilon, 1e-5, participations)
    assert participations_of(epsilon, 1e-5, noise_multiplier) == participations
    assert participations_of(epsilon, 1e-5, noise_multiplier * 0.9999) == participations - 1


def test_budget_counts_squares_of_loads() -> None:
    """Sixty-four updates of weight 1 cost as much as one of weight 8, and two of weight 8 at once as much as four."""
    budget = ClientBudget(noise_multiplier=2.0, weight_levels=8, delta=1e-5)
    assert budget.mu(64 * 1**2) == budget.mu(8**2) == 0.5
    assert budget.mu(16**2) == budget.mu(budget.of_participations(4)) == 1.0
    assert budget.epsilon(budget.of_participations(4)) == pytest.approx(4.3774, abs=1e-3)


@pytest.mark.parametrize("epsilon", [0.0, 0.5, 4.0, 30.0])
def test_largest_account_is_within_epsilon_and_the_next_is_not(epsilon: float) -> None:
    budget = ClientBudget(noise_multiplier=1.3, weight_levels=8, delta=1e-6)
    most = budget.within(epsilon)
    assert budget.epsilon(most) <= epsilon * (1 + 1e-9) < budget.epsilon(most + 1)
