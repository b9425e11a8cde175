"""Integer noise: Gaussian, uncorrelated, repeatable, and independent for every other secret or purpose."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import numpy.typing as npt
import pytest
from scipy import stats

from fedqueue.privacy.gaussian_integers import FARTHEST, PIECE, integer_noise, normal_pieces

SECRET = b"a secret of thirty-two bytes ...."[:32]
DEVIATION = 2.0**16


def noise(purpose: str = "cohort", count: int = 200_000, secret: bytes = SECRET) -> npt.NDArray[np.int64]:
    return np.concatenate(list(integer_noise(secret, purpose, DEVIATION, count)))


@pytest.mark.parametrize("purpose", ["cohort one", "cohort two", "cohort three"])
def test_noise_is_gaussian(purpose: str) -> None:
    drawn = noise(purpose) / DEVIATION
    assert stats.kstest(drawn, "norm").pvalue > 1e-3
    assert drawn.var() == pytest.approx(1, abs=5 * np.sqrt(2 / len(drawn)))
    assert stats.kurtosis(drawn) == pytest.approx(0, abs=5 * np.sqrt(24 / len(drawn)))


def test_small_noise_is_rounded_to_the_nearest_integer() -> None:
    """Each integer has the probability of the interval around it."""
    drawn = np.concatenate(list(integer_noise(SECRET, "small", 1.5, 200_000)))
    values = np.arange(-5, 6)
    expected = stats.norm.cdf(values + 0.5, scale=1.5) - stats.norm.cdf(values - 0.5, scale=1.5)
    seen = np.array([(drawn == value).sum() for value in values])
    inside = expected * len(drawn)
    assert stats.chisquare(seen, inside / inside.sum() * seen.sum()).pvalue > 1e-3


def test_coordinates_are_uncorrelated() -> None:
    drawn = noise()
    half = PIECE // 2
    for shift in (1, 2, half, PIECE):  # `half`: the two deviates that are made of one pair of words
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


def test_pieces_are_new_memory_and_not_far_out() -> None:
    pieces = list(normal_pieces(SECRET, "pieces", 2 * PIECE))
    assert [len(piece) for piece in pieces] == [PIECE, PIECE]
    assert np.abs(np.concatenate(pieces)).max() < FARTHEST
    assert not np.shares_memory(pieces[0], pieces[1])


def test_integer_noise_needs_no_torch() -> None:
    program = "import sys, fedqueue.privacy.gaussian_integers as g; list(g.integer_noise(bytes(32), 'x', 9.0, 5))"
    subprocess.run([sys.executable, "-c", f"{program}; assert 'torch' not in sys.modules"], check=True)
