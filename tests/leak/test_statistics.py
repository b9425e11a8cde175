"""Statistics of the attacks, against scikit-learn and against counting."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score, roc_curve

from fedqueue.leak.statistics import auc, bootstrap, correlation, mean_of_units, split_in_two, true_positives


@pytest.mark.parametrize("seed", range(5))
def test_auc_is_that_of_pair_counting_and_scikit_learn(seed: int) -> None:
    rng = np.random.default_rng(seed)
    members, controls = rng.integers(9, size=30).astype(float), rng.integers(8, size=41).astype(float)  # with ties
    pairs = [(m > c) + 0.5 * (m == c) for m in members for c in controls]
    truth = [1] * 30 + [0] * 41
    assert auc(members, controls) == pytest.approx(np.mean(pairs))
    assert auc(members, controls) == pytest.approx(roc_auc_score(truth, [*members, *controls]))


@pytest.mark.parametrize("seed", range(5))
def test_true_positives_are_those_of_the_roc_curve(seed: int) -> None:
    rng = np.random.default_rng(seed)
    members, controls = rng.normal(1.0, 1.0, 300), rng.normal(0.0, 1.0, 250)
    fpr, tpr, _ = roc_curve([1] * 300 + [0] * 250, [*members, *controls], drop_intermediate=False)
    assert true_positives(members, controls) == pytest.approx(tpr[fpr <= 0.01].max())


def test_correlation_of_a_constant_vector_is_undefined() -> None:
    a = np.array([1.0, 2.0, 4.0])
    assert correlation(a, 3 * a + 1) == pytest.approx(1.0)
    assert correlation(a, np.ones(3)) is None


def test_bootstrap_covers_the_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(60):
        low, high = bootstrap([(rng.normal(0.0, 1.0, 50),)], mean_of_units(lambda x: float(x.mean())), seed)
        covered += low <= 0.0 <= high
    assert 50 <= covered <= 60


def test_bootstrap_repeats_with_its_seed() -> None:
    units = [(np.arange(9.0),), (np.arange(5.0),)]
    statistic = mean_of_units(lambda x: float(x.mean()))
    assert bootstrap(units, statistic, 3) == bootstrap(units, statistic, 3) != bootstrap(units, statistic, 4)


def test_halves_of_the_controls_have_no_row_in_common() -> None:
    for a, b in split_in_two(np.arange(11.0), 4, 0):
        assert sorted([*a, *b]) == list(range(11))
