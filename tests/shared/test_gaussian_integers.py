"""Integer noise: Gaussian, uncorrelated, repeatable, and independent for every other secret or purpose."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import numpy.typing as npt
import pytest
from scipy import stats

from fedqueue.privacy import gaussian_integers
from fedqueue.privacy.gaussian_integers import FARTHEST, PIECE, integer_noise, normal_pieces

SECRET = b"a secret of thirty-two bytes ...."[:32]
DEVIATION = 2.0**16


def noise(purpose: str = "cohort", count: int = 200_000, secret: bytes = SECRET) -> npt.NDArray[np.int64]:
    return np.concatenate([piece.copy() for piece in integer_noise(secret, purpose, DEVIATION, count)])


@pytest.mark.parametrize("purpose", ["cohort one", "cohort two", "cohort three"])
def test_noise_is_gaussian(purpose: str) -> None:
    drawn = noise(purpose) / DEVIATION
    assert stats.kstest(drawn, "norm").pvalue > 1e-3
    assert drawn.var() == pytest.approx(1, abs=5 * np.sqrt(2 / len(drawn)))
    assert stats.kurtosis(drawn) == pytest.approx(0, abs=5 * np.sqrt(24 / len(drawn)))


def test_small_noise_is_rounded_to_the_nearest_integer() -> None:
    """Each integer has the probability of the interval around it."""
    drawn = np.concatenate([piece.copy() for piece in integer_noise(SECRET, "small", 1.5, 200_000)])
    values = np.arange(-5, 6)
    expected = stats.norm.cdf(values + 0.5, scale=1.5) - stats.norm.cdf(values - 0.5, scale=1.5)
    seen = np.array([(drawn == value).sum() for value in values])
    inside = expected * len(drawn)
    assert stats.chisquare(seen, inside / inside.sum() * seen.sum()).pvalue > 1e-3


def test_coordinates_are_uncorrelated() -> None:
    drawn = noise()
    half = PIECE // 2
    for shift in (1, 2, half, PIECE):
        assert abs(np.corrcoef(drawn[:-shift], drawn[shift:])[0, 1]) < 5 / np.sqrt(len(drawn) - shift)
        squares = (drawn / DEVIATION) ** 2
        assert abs(np.corrcoef(squares[:-shift], squares[shift:])[0, 1]) < 5 / np.sqrt(len(drawn) - shift)


@pytest.mark.parametrize("other", [noise("cohort2"), noise(secret=bytes(32))], ids=["purpose", "secret"])
def test_other_noise_is_independent(other: npt.NDArray[np.int64]) -> None:
    assert abs(np.corrcoef(noise(), other)[0, 1]) < 5 / np.sqrt(len(other))


@pytest.mark.parametrize("count", [1, 2, 7, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE + 5])
def test_same_noise_has_the_same_bits(count: int) -> None:
    first = noise(count=count)
    assert len(first) == count
    assert first.tobytes() == noise(count=count).tobytes()


def deviates(count: int, purpose: str = "pieces") -> npt.NDArray[np.float64]:
    return np.concatenate([piece.copy() for piece in normal_pieces(SECRET, purpose, count)])


def test_pieces_have_at_most_their_size_and_are_not_far_out() -> None:
    assert [len(piece) for piece in normal_pieces(SECRET, "pieces", 2 * PIECE + 3)] == [PIECE, PIECE, 3]
    assert np.abs(deviates(2 * PIECE)).max() < FARTHEST


def test_every_part_of_the_curve_has_its_share() -> None:
    """Twenty million deviates: the body, the edges of the layers and the tail, where a ziggurat may be wrong."""
    edges = np.concatenate([-gaussian_integers._EDGES[1:], gaussian_integers._EDGES[1:-1][::-1], [3.9, 4.2, 4.6]])
    edges = np.sort(np.concatenate([edges, (edges[1:] + edges[:-1]) / 2, [-3.9, -4.2, -4.6]]))
    seen, count = np.zeros(len(edges) + 1, np.int64), 20_000_000
    for piece in normal_pieces(SECRET, "shares", count):
        seen += np.bincount(np.searchsorted(edges, piece), minlength=len(seen))
    expected = np.diff(np.concatenate([[0], stats.norm.cdf(edges), [1]]))
    big = expected * count > 5
    assert stats.chisquare(seen[big], expected[big] / expected[big].sum() * seen[big].sum()).pvalue > 1e-3
    assert seen[~big].sum() < 50


def test_layers_have_equal_areas() -> None:
    widths, heights = gaussian_integers._EDGES[1:-1], gaussian_integers._HEIGHTS
    areas = widths * (heights[2:] - heights[1:-1])
    tail = np.sqrt(2 * np.pi) * stats.norm.sf(widths[0])
    assert areas == pytest.approx(np.full(len(areas), widths[0] * heights[1] + tail), rel=1e-9)


def test_tail_is_that_of_the_curve() -> None:
    drawn = gaussian_integers._Normals(SECRET, "tail")._tail(200_000)
    edge = gaussian_integers._EDGES[1]
    assert stats.kstest(stats.norm.sf(drawn) / stats.norm.sf(edge), "uniform").pvalue > 1e-3


def test_tail_ends_where_it_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gaussian_integers, "FARTHEST", 3.7)
    assert 3.66 < np.abs(deviates(4 * PIECE)).max() <= 3.7


def test_integer_noise_needs_no_torch() -> None:
    program = "import sys, fedqueue.privacy.gaussian_integers as g; list(g.integer_noise(bytes(32), 'x', 9.0, 5))"
    subprocess.run([sys.executable, "-c", f"{program}; assert 'torch' not in sys.modules"], check=True)
