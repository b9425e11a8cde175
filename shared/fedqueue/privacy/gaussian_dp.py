"""Gaussian differential privacy: what noise costs that is added to a sum of bounded vectors, in closed form.

A mechanism is μ-GDP where its output tells two neighbours apart no better than one draw tells N(0, 1) from N(μ, 1).
Noise of standard deviation σ on a sum that a neighbour changes by at most s in L2 norm has μ = s / σ. Squares of μ add
up, also where each step is chosen by what the earlier ones gave (Koskela et al., arXiv 2209.15596; Smith and Thakurta,
arXiv 2210.17520). A μ-GDP mechanism is (ε, δ)-DP for every ε ≥ 0 with (Dong, Roth, Su, arXiv 1905.02383,
corollary 2.13)

    δ(ε, μ) = Φ(−ε/μ + μ/2) − e^ε Φ(−ε/μ − μ/2)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedqueue.config.privacy import ClientPrivacyConfig

PRECISION = 1e-12  # relative, of an ε or a μ that is found by bisection
_FAR = 20.0
"""Beyond this, a Mills ratio is taken from its continued fraction: e^(x²/2) would be inexact."""


def gaussian_delta(mu: float, epsilon: float) -> float:
    """Return the smallest δ of a μ-GDP mechanism at ε ≥ 0."""
    if mu <= 0:
        return 0.0
    near, far = epsilon / mu - mu / 2, epsilon / mu + mu / 2
    density = math.exp(-near * near / 2) / math.sqrt(2 * math.pi)  # it is e^ε times the density at `far`, too
    if near < 0:
        return math.erfc(near / math.sqrt(2)) / 2 - density * _mills(far)
    return density * (_mills(near) - _mills(far))


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Return the smallest ε of a μ-GDP mechanism at δ > 0, at least 0."""
    if gaussian_delta(mu, 0.0) <= delta:
        return 0.0
    low, high = 0.0, 1.0
    while gaussian_delta(mu, high) > delta:
        low, high = high, 2 * high
    while high - low > PRECISION * high:
        middle = (low + high) / 2
        low, high = (middle, high) if gaussian_delta(mu, middle) > delta else (low, middle)
    return high


def gaussian_mu(epsilon: float, delta: float) -> float:
    """Return the largest μ with which a μ-GDP mechanism is (ε, δ)-DP, for ε ≥ 0 and 0 < δ < 1."""
    low, high = 0.0, 1.0
    while gaussian_delta(high, epsilon) <= delta:
        low, high = high, 2 * high
    while high - low > PRECISION * high:
        middle = (low + high) / 2
        low, high = (middle, high) if gaussian_delta(middle, epsilon) <= delta else (low, middle)
    return low


def _mills(x: float) -> float:
    """(1 − Φ(x)) / φ(x) for x ≥ 0."""
    if x < _FAR:
        return math.sqrt(math.pi / 2) * math.exp(x * x / 2) * math.erfc(x / math.sqrt(2))
    fraction = x
    for k in range(40, 0, -1):
        fraction = x + k / fraction
    return 1 / fraction


@dataclass(frozen=True)
class ClientBudget:
    """What the loads of one client cost, and how much may be spent.

    A client's load ℓ in a version is the sum of its updates' integer weights, at most W. Each update has a norm of at
    most L, and the version's noise has σ = z W L: so the version is (ℓ / (z W))-GDP for this client. An account is the
    integer Σ ℓ², over all noised sums that the client was in.
    """

    noise_multiplier: float
    """z"""
    weight_levels: int
    """W"""
    delta: float
    """δ"""

    def mu(self, squares: int) -> float:
        """Return μ = √(Σ ℓ²) / (z W)."""
        return math.sqrt(squares) / (self.noise_multiplier * self.weight_levels)

    def epsilon(self, squares: int) -> float:
        """Return the ε of a client whose account is `squares`."""
        return gaussian_epsilon(self.mu(squares), self.delta)

    def of_participations(self, participations: int) -> int:
        """Return the largest account of a client that may take part so often with a fresh update: P W²."""
        return participations * self.weight_levels**2

    def within(self, epsilon: float) -> int:
        """Return the largest account that costs at most `epsilon`."""
        most = int((gaussian_mu(epsilon, self.delta) * self.noise_multiplier * self.weight_levels) ** 2) + 1
        while most > 0 and self.epsilon(most) > epsilon * (1 + PRECISION):
            most -= 1
        return most


def noise_multiplier_of(epsilon: float, delta: float, participations: int) -> float:
    """Return the smallest z with which P fresh updates of a client cost at most `epsilon`: √P / μ(ε, δ)."""
    return math.sqrt(participations) / gaussian_mu(epsilon, delta)


def participations_of(epsilon: float, delta: float, noise_multiplier: float) -> int:
    """Return how many fresh updates of a client cost at most `epsilon`."""
    return ClientBudget(noise_multiplier, 1, delta).within(epsilon)


def client_noise(settings: ClientPrivacyConfig) -> float:
    """Return z of these settings, which are on: as given, or the smallest one that their ε and P need."""
    if settings.noise_multiplier is not None:
        return settings.noise_multiplier
    assert settings.epsilon is not None
    assert settings.max_participations is not None
    return noise_multiplier_of(settings.epsilon, settings.at_delta, settings.max_participations)


def client_budget(settings: ClientPrivacyConfig, weight_levels: int) -> tuple[ClientBudget, int]:
    """Return what loads cost under these settings, which are on, and the largest account Σ ℓ² of a client."""
    budget = ClientBudget(client_noise(settings), weight_levels, settings.at_delta)
    if settings.max_participations is not None:
        return budget, budget.of_participations(settings.max_participations)
    assert settings.epsilon is not None
    return budget, budget.within(settings.epsilon)
