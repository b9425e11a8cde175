"""The audit by canaries: its bound is valid, stays below what is claimed, and exceeds it where the claim is wrong."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy import stats

from fedqueue.config.privacy import ExamplePrivacyConfig
from fedqueue.config.training import TrainingConfig
from fedqueue.leak.canaries import (
    CanaryAudit,
    audit_rows,
    canary_measurements,
    epsilon_bound,
    guessed_right,
    p_value,
)
from fedqueue.row_gradients import RowGradients

DELTA = 1e-6


@pytest.mark.parametrize(("correct", "guesses"), [(90, 100), (100, 100), (55, 100), (0, 10), (380, 400)])
@pytest.mark.parametrize("epsilon", [0.0, 0.7, 2.0, 5.0])
def test_p_value_is_that_of_the_theorem(correct: int, guesses: int, epsilon: float) -> None:
    """By scipy's binomial tails, each i on its own."""
    binomial = stats.binom(guesses, math.exp(epsilon) / (1 + math.exp(epsilon)))
    beta = binomial.sf(correct - 1)
    alpha = max(((binomial.sf(correct - i - 1) - beta) / i for i in range(1, correct + 1)), default=0.0)
    expected = min(1.0, beta + 2 * 1000 * 1e-5 * alpha)
    assert p_value(correct, guesses, 1000, epsilon, 1e-5) == pytest.approx(expected, rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("epsilon", [0.5, 2.0])
def test_randomized_response_is_bounded_as_often_as_is_said(epsilon: float) -> None:
    """Each guess is right with probability e^ε / (1 + e^ε): the least private mechanism that ε allows."""
    rng = np.random.default_rng(0)
    right = rng.binomial(200, math.exp(epsilon) / (1 + math.exp(epsilon)), 2000)
    bounds = {int(v): epsilon_bound(int(v), 200, 2000, 0.0) for v in np.unique(right)}
    exceeded = np.mean([bounds[int(v)] > epsilon for v in right])
    assert exceeded <= 0.06
    assert np.mean([bounds[int(v)] for v in right]) > 0.5 * epsilon


def test_guesses_are_the_extremes() -> None:
    scores, there = np.arange(40.0), np.arange(40) >= 20
    assert guessed_right(scores, there) == (8, 8)
    assert guessed_right(-scores, there) == (8, 0)


def audited(noise_multiplier: float, seed: int, delta: float = DELTA, **training: Any) -> CanaryAudit:
    privacy = ExamplePrivacyConfig(max_grad_norm=0.5, noise_multiplier=noise_multiplier, delta=delta)
    return audit_rows(privacy, TrainingConfig(batch_size=100, **training), 100, 1, seed)


def test_bound_is_below_the_claim_for_each_of_many_seeds() -> None:
    audits = [audited(2.0, seed) for seed in range(20)]
    assert all(0.2 < audit.bound < audit.claimed for audit in audits)
    assert all(audit.estimate < 1.2 * audit.claimed for audit in audits)
    assert 0.8 * audits[0].claimed < np.mean([audit.estimate for audit in audits]) < audits[0].claimed
    assert np.mean([audit.chance for audit in audits]) < 0.05


def test_bound_exceeds_the_claim_without_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedqueue.private_training.with_noise", lambda values, deviation, random: values)
    audit = audited(2.0, seed=0)
    assert audit.correct == audit.guesses
    assert audit.bound > audit.claimed


def test_half_of_the_noise_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from fedqueue.privacy.secret_random import with_noise

    half: Any = lambda values, deviation, random: with_noise(values, deviation / 2, random)  # noqa: E731
    monkeypatch.setattr("fedqueue.private_training.with_noise", half)
    audits = [audited(2.0, seed) for seed in range(5)]
    assert all(audit.estimate > 1.5 * audit.claimed for audit in audits)


def test_missing_clipping_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    clipped_sum = RowGradients.clipped_sum
    monkeypatch.setattr(RowGradients, "clipped_sum", lambda self, chosen, norm: clipped_sum(self, chosen, 1e6))
    audit = audited(2.0, seed=0)
    assert audit.bound > audit.claimed


def test_steps_that_sample_rows_are_audited() -> None:
    privacy = ExamplePrivacyConfig(max_grad_norm=1.0, noise_multiplier=1.0, delta=DELTA)
    audit = audit_rows(privacy, TrainingConfig(batch_size=20), 200, 30, seed=0)
    assert 0.2 * audit.claimed < audit.estimate < audit.claimed
    assert audit.bound < audit.claimed


def test_audit_in_the_table_finds_too_little_noise() -> None:
    privacy = ExamplePrivacyConfig(max_grad_norm=1.0, epsilon=3.0, jobs=1, delta=DELTA)
    training = TrainingConfig(batch_size=100, local_steps=1)
    bound, estimate, none, far = canary_measurements(privacy, training, 100, seed=0)
    assert (bound.attack, estimate.attack) == ("canaries", "canaries_estimate")
    assert bound.configured
    assert not none.configured
    assert bound.protection == "noise for rows, claimed ε 3.00"
    assert bound.value is not None
    assert none.value is not None
    assert estimate.value is not None
    assert far.value is not None
    assert bound.value < estimate.value < 3.0 < none.value < far.value
