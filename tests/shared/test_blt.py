"""Correlated noise: its covariance, its account for every pattern, and that the fit pays."""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt
import pytest

from fedqueue.privacy.blt import Blt, fit_blt

Numbers = npt.NDArray[np.float64]
SETTINGS = [(14, 3, 4), (14, 1, 14), (12, 5, 2), (2, 1, 1)]


def matrix(blt: Blt) -> Numbers:
    """C, written out."""
    n = blt.versions
    return np.array([[blt.coefficients[row - column] if row >= column else 0.0 for column in range(n)]
                     for row in range(n)])  # fmt: skip


@pytest.mark.parametrize(("versions", "separation", "participations"), SETTINGS)
def test_inverse_is_that_of_the_matrix(versions: int, separation: int, participations: int) -> None:
    blt = fit_blt(versions, separation, participations)
    inverse = np.linalg.inv(matrix(blt))
    assert np.allclose(inverse[:, 0], blt.inverse, atol=1e-12)
    assert np.linalg.norm(inverse, axis=1).max() == pytest.approx(blt.row_norm)
    prefix_sums = np.tril(np.ones((versions, versions))) @ inverse
    assert np.linalg.norm(prefix_sums, axis=1).max() == pytest.approx(blt.largest_error)


@pytest.mark.parametrize(("versions", "separation", "participations"), SETTINGS)
def test_sensitivity_is_the_worst_of_all_patterns(versions: int, separation: int, participations: int) -> None:
    blt = fit_blt(versions, separation, participations)
    c = matrix(blt)
    worst = 0.0
    for chosen in itertools.product((0, 1), repeat=versions):
        pattern = np.flatnonzero(chosen)
        if len(pattern) <= participations and (np.diff(pattern) >= separation).all():
            worst = max(worst, float(np.linalg.norm(c[:, pattern].sum(axis=1))))
    assert blt.sensitivity(separation, participations) == pytest.approx(worst)


@pytest.mark.parametrize("seed", range(5))
def test_account_of_a_pattern_is_its_worst_vectors(seed: int) -> None:
    """No vectors of the pattern's norms change C x by more, and equal directions change it by just that."""
    rng = np.random.default_rng(seed)
    blt = fit_blt(12, 2, 6)
    loads = {int(u): int(rng.integers(1, 9)) for u in rng.choice(12, 5, replace=False)}
    account = blt.squared_sensitivity(loads)
    c, rows, norms = matrix(blt), list(loads), np.array(list(loads.values()), float)
    for _ in range(200):
        vectors = rng.normal(size=(5, 2))
        vectors *= (norms / np.linalg.norm(vectors, axis=1))[:, None]
        assert np.square(c[:, rows] @ vectors).sum() <= account + 1e-9
    aligned = norms[:, None] * np.array([[0.6, 0.8]])
    assert np.square(c[:, rows] @ aligned).sum() == pytest.approx(account)


def test_noise_has_the_covariance_of_the_inverse() -> None:
    blt, width = fit_blt(8, 2, 4), 200_000
    rng, noise = np.random.default_rng(0), fit_blt(8, 2, 4).noise()
    rows = [np.concatenate(list(noise.next(iter([rng.normal(size=width)])))) for _ in range(8)]
    inverse = np.linalg.inv(matrix(blt))
    assert np.allclose(np.cov(np.array(rows)), inverse @ inverse.T, atol=6 / np.sqrt(width))


def test_noise_in_pieces_is_the_product_with_the_inverse() -> None:
    blt = fit_blt(9, 2, 4)
    z = np.random.default_rng(3).normal(size=(9, 7))
    noise = blt.noise()
    made = [np.concatenate([p.copy() for p in noise.next(iter([row[:4].copy(), row[4:].copy()]))]) for row in z]
    assert np.allclose(made, np.linalg.solve(matrix(blt), z))


def test_noise_ends_with_the_horizon() -> None:
    noise = Blt(2, (0.1, 0.1), (0.5, 0.5)).noise()
    for _ in range(2):
        list(noise.next(iter([np.zeros(1)])))
    with pytest.raises(ValueError, match="2 versions"):
        list(noise.next(iter([np.zeros(1)])))


@pytest.mark.parametrize(
    ("versions", "separation", "participations", "gain"),
    [(100, 5, 20, 1.97), (200, 20, 10, 3.35), (500, 50, 10, 4.95), (200, 100, 2, 4.77)],
)
def test_sums_have_less_noise_than_independent_noise(
    versions: int, separation: int, participations: int, gain: float
) -> None:
    """At equal privacy; independent noise has the sensitivity √k and the error √n."""
    blt = fit_blt(versions, separation, participations)
    independent = np.sqrt(participations * versions)
    assert independent / (blt.sensitivity(separation, participations) * blt.largest_error) >= gain
    assert (np.diff(blt.coefficients) <= 0).all()
    assert blt.coefficients.min() >= 0


@pytest.mark.parametrize(("scales", "decays"), [((0.6, 0.6), (0.5, 0.5)), ((-0.1, 0.2), (0.5, 0.5)), ((0.1,), (1.0,))])
def test_matrix_without_its_account_is_refused(scales: tuple[float, ...], decays: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"scale|decay"):
        Blt(5, scales, decays)
