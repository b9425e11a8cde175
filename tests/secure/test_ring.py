"""Updates as integers: bounds at their extremes, rounding without bias, and weights."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedqueue.config.schema import Config
from fedqueue.errors import ConfigurationError
from fedqueue.secure.masks import ROUNDING, MaskStream
from fedqueue.secure.ring import Fill, Ring, examples_share, level, ring_of
from fedqueue.tensors.manifest import PARAMETER, Manifest, TensorSpec

RINGS = st.builds(
    Ring,
    clip_norm=st.floats(1e-6, 1e6),
    buffer_size=st.integers(2, 512),
    weight_levels=st.integers(1, 8),
    keepers=st.integers(1, 3),
    parameters=st.integers(1, 300),
)


def random_words(seed: int = 0) -> Fill:
    return MaskStream(seed.to_bytes(32, "little"), ROUNDING).next_into


def quantized(ring: Ring, delta: npt.NDArray[np.float32], seed: int = 0, share: float = 1.0) -> npt.NDArray[np.int32]:
    return ring.quantize(delta.copy(), random_words(seed), share)


def config_of(**changes: Any) -> Config:
    aggregation = {"buffer_size": 4, **changes.pop("aggregation", {})}
    secure = {"keepers": ["north", "south"], **changes.pop("secure", {})}
    return Config(
        task={"entrypoint": "task.py:Mine"}, stop={"versions": 1}, aggregation=aggregation, secure=secure, **changes
    )


def manifest_of(parameters: int) -> Manifest:
    return Manifest((TensorSpec("w", "float32", (parameters,), 0, parameters, PARAMETER),))


@given(RINGS)
def test_the_largest_sum_does_not_wrap(ring: Ring) -> None:
    largest = ring.most_weight * ring.levels + ring.keepers * ring.dither
    assert largest < 2**31
    assert (ring.levels + 1) * ring.most_weight + ring.keepers * ring.dither > 2**31 - 1, "a step more would not fit"


@pytest.mark.parametrize(("weight_levels", "dither"), [(1, 1), (2, 2), (3, 6), (4, 12), (8, 840)])
def test_every_possible_divisor_divides_the_dither(weight_levels: int, dither: int) -> None:
    ring = Ring(1.0, 4, weight_levels, 2, 10)
    assert ring.dither == dither
    assert not [g for g in range(1, weight_levels + 1) if ring.dither % g]


@given(RINGS, st.integers(0, 2**32), st.floats(1e-6, 1e6), st.sampled_from(["one", "equal", "normal", "tiny"]))
def test_no_quantized_update_is_longer_than_the_bound(ring: Ring, seed: int, norm: float, shape: str) -> None:
    d = ring.parameters
    vector = {
        "one": np.eye(1, d).ravel(),
        "equal": np.full(d, 1.0),
        "normal": np.random.default_rng(seed).normal(size=d),
        "tiny": np.full(d, 1e-6) + np.eye(1, d).ravel(),
    }[shape]
    delta = (vector / np.linalg.norm(vector) * norm * ring.clip_norm).astype(np.float32)
    found = quantized(ring, delta, seed)
    assert sum(int(q) ** 2 for q in found) <= ring.levels**2


def test_a_short_delta_is_off_by_less_than_a_unit() -> None:
    ring = Ring(10.0, 10, 8, 2, 200_000)  # several pieces
    delta = np.random.default_rng(0).normal(size=ring.parameters).astype(np.float32) * np.float32(0.01)
    found = quantized(ring, delta)
    assert np.abs(found - delta.astype(np.float64) / ring.scale).max() < 1
    assert math.sqrt(float((found.astype(float) ** 2).sum())) * ring.scale == pytest.approx(
        float(np.linalg.norm(delta)), rel=1e-4
    )


def test_a_long_delta_is_scaled_down_to_the_clip_norm() -> None:
    ring = Ring(2.0, 4, 8, 2, 100)
    delta = np.random.default_rng(1).normal(size=100).astype(np.float32) * np.float32(1e6)
    kept = quantized(ring, delta) * ring.scale
    direction = delta / np.linalg.norm(delta.astype(np.float64))
    assert kept == pytest.approx(2.0 * direction, rel=1e-3, abs=1e-6)


def test_a_share_scales_the_clipped_delta() -> None:
    """A long delta of a client with few examples must not keep the whole clip norm."""
    ring = Ring(2.0, 4, 8, 2, 100)
    delta = np.random.default_rng(1).normal(size=100).astype(np.float32) * np.float32(1e3)
    assert quantized(ring, delta, share=0.25) == pytest.approx(quantized(ring, delta) * 0.25, abs=1.5)


def test_rounding_has_no_bias() -> None:
    """The mean of 60,000 roundings of x = 0.3 units is within five standard errors of x."""
    ring = Ring(1.0, 4, 8, 2, 60_000)
    for units in (0.3, -0.3, 7.9):
        delta = np.full(60_000, units * ring.scale, np.float32)
        exact = float(delta[0]) / ring.scale
        mean = float(quantized(ring, delta).mean())
        assert abs(mean - exact) < 5 * 0.5 / math.sqrt(60_000)


def test_whole_units_stay_as_they_are() -> None:
    ring = Ring(1.0, 3, 8, 1, 5)
    ring = Ring(float(ring.levels), 3, 8, 1, 5)  # a unit is 1.0
    delta = np.array([0.0, 1.0, -1.0, 5.0, -7.0], np.float32)
    assert quantized(ring, delta).tolist() == [0, 1, -1, 5, -7]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_delta_that_is_not_finite_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="not finite"):
        Ring(1.0, 3, 8, 1, 3).quantize(np.array([0.0, bad, 0.0], np.float32), random_words())


def test_a_delta_of_zeros_stays_zero() -> None:
    assert not Ring(1.0, 3, 8, 1, 3).quantize(np.zeros(3, np.float32), random_words()).any()


# Weights


def test_levels_are_the_rounded_staleness_weights() -> None:
    config = config_of()  # s(τ) = (1 + τ)^−½, W = 8
    assert [level(tau, config) for tau in (0, 1, 2, 3, 8, 99, 100_000)] == [8, 6, 5, 4, 3, 1, 1]


def test_a_level_is_at_most_a_sixteenth_off() -> None:
    config = config_of(aggregation={"staleness": {"function": "exponential", "a": 0.05}})
    for tau in range(40):
        assert abs(level(tau, config) / 8 - math.exp(-0.05 * tau)) <= 1 / 16


@pytest.mark.parametrize("aggregation", [{"strategy": "fadas"}, {"staleness": {"function": "constant"}}])
def test_without_staleness_weights_every_update_weighs_the_same(aggregation: dict[str, Any]) -> None:
    assert {level(tau, config_of(aggregation=aggregation)) for tau in range(50)} == {8}


def test_one_level_weighs_every_update_the_same() -> None:
    assert {level(tau, config_of(secure={"weight_levels": 1})) for tau in range(50)} == {1}


def test_the_examples_share_is_capped() -> None:
    config = config_of(aggregation={"weight_by_examples": True}, secure={"max_examples": 200})
    assert [examples_share(n, config) for n in (1, 100, 200, 5000)] == [0.005, 0.5, 1.0, 1.0]
    assert examples_share(100, config_of(secure={"max_examples": 200})) == 1.0


# Limits


def test_the_ring_of_a_run_has_its_settings() -> None:
    ring = ring_of(config_of(secure={"clip_norm": 2.5, "weight_levels": 4}), manifest_of(7))
    assert ring == Ring(2.5, 4, 4, 2, 7)


def test_too_coarse_a_ring_is_refused() -> None:
    config = config_of(aggregation={"buffer_size": 500}, clients={"count": 500})
    with pytest.raises(ConfigurationError, match=r"aggregation.buffer_size = 500.*lower buffer_size or weight_levels"):
        ring_of(config, manifest_of(2**31))
    ring_of(config, manifest_of(2**20))
