"""Numbers from a secret key: the distributions, and that keys and purposes give independent streams."""

from __future__ import annotations

import math
import os

import numpy as np
import pytest
import torch

from fedqueue.privacy.secret_random import SecretRandom, with_noise

KEY = bytes(range(32))


def stream(purpose: str = "noise", key: bytes = KEY) -> SecretRandom:
    return SecretRandom(key, purpose)


def kolmogorov_smirnov(values: np.ndarray) -> float:
    """√n times the largest distance from the distribution function of a standard normal."""
    ordered = np.sort(values)
    expected = np.array([0.5 * (1 + math.erf(x / math.sqrt(2))) for x in ordered])
    steps = np.arange(len(values) + 1) / len(values)
    distance = max(np.abs(expected - steps[1:]).max(), np.abs(expected - steps[:-1]).max())
    return float(distance) * math.sqrt(len(values))


def test_deviates_are_standard_normal() -> None:
    values = stream().normals(200_001).numpy()
    assert values.dtype == np.float64
    assert values.shape == (200_001,)
    assert kolmogorov_smirnov(values) < 1.95, "the value that one of 1,000 samples exceeds"
    assert float((values**4).mean()) == pytest.approx(3.0, abs=0.1)
    assert abs(values).max() > 4.0, "tails"
    halves = values[:100_000], values[100_000:200_000]
    assert abs(np.corrcoef(*halves)[0, 1]) < 0.015, "the two of a pair"


def test_streams_of_other_keys_and_purposes_are_independent() -> None:
    first = stream().normals(50_000)
    assert torch.equal(first, stream().normals(50_000))
    for other in (stream("sampling"), stream(key=os.urandom(32))):
        assert abs(np.corrcoef(first.numpy(), other.normals(50_000).numpy())[0, 1]) < 0.02


def test_successive_calls_continue_the_stream() -> None:
    source = stream()
    assert not set(source.normals(1000).tolist()) & set(source.normals(1000).tolist())


@pytest.mark.parametrize("rate", [0.02, 0.3, 0.9])
def test_each_row_is_included_with_the_rate(rate: float) -> None:
    source, counts, sizes = stream("sampling"), np.zeros(40), []
    for _ in range(4000):
        chosen = source.chosen(40, rate)
        counts[chosen] += 1
        sizes.append(len(chosen))
    expected = 4000 * rate
    chi_square = float(((counts - counts.mean()) ** 2 / (counts.mean() * (1 - rate))).sum())
    assert chi_square < 73, "the value that one of 1,000 samples of 39 degrees of freedom exceeds"
    assert abs(counts.mean() - expected) < 4 * np.sqrt(expected * (1 - rate) / 40)
    assert np.var(sizes) == pytest.approx(40 * rate * (1 - rate), rel=0.15), "independent of each other"


def test_rate_of_one_includes_every_row() -> None:
    assert stream().chosen(5, 1.0).tolist() == [0, 1, 2, 3, 4]
    assert stream().chosen(5, 1e-300).tolist() == []


@pytest.mark.parametrize("deviation", [1e-4, 0.7, 300.0])
def test_noise_has_the_deviation_and_lies_on_a_grid(deviation: float) -> None:
    values = torch.linspace(-3, 3, 20_000, dtype=torch.float64) * 0.123
    noise = (with_noise(values, deviation, stream()) - values).numpy()
    assert noise.std() == pytest.approx(deviation, rel=0.03)
    assert abs(noise.mean()) < 4 * deviation / np.sqrt(20_000)
    scaled = with_noise(values, deviation, stream()) / 2.0 ** (np.floor(np.log2(deviation)) - 18)
    assert torch.equal(scaled, scaled.round())


def test_short_key_is_refused() -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        SecretRandom(b"short", "noise")
