"""Updates as integers modulo 2³², whose weighted sum is exact: scale, clipping, rounding and weights.

Notation: a version merges updates i with integer weights w_i from 1 to W. d is the number of parameters, n that of the
keepers, K the buffer size, C the clip norm, and L the largest norm of an update in units of the ring:

    L = ⌊(2³¹ − 1 − n D) / (W (K + 1 + 12 z √n))⌋        γ = C / L, the value of one unit        D = lcm(1 … W)

A buffer is full with K updates of enough clients, and a client weighs W in it at most, so that Σ w_i ≤ W (K + 1). Then
|Σ w_i q_i + Σ u_k| < 2³¹ in every coordinate: the sum modulo 2³² is the sum itself, whatever the order of arrival.

Each keeper adds a dither u_k, uniform over D consecutive integers. Without it the weights would tell low bits: modulo a
common divisor g of all weights but one, the sum is that one update times its weight. Every g ≤ W divides D, so that the
sum modulo g is uniform while one keeper is honest. With W = 1 there is no such g, and D = 1: no dither.

Where the number of examples n_i weighs and is hidden, an update has one word more, ⌊L n̂_i⌋ with n̂_i = min(n_i, c) / c,
c = `max_examples`. It is masked, weighted and dithered as the others are, so that only Σ w_i n̂_i is seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from fedqueue.config.schema import Config
from fedqueue.config.secure_limits import quantization_levels
from fedqueue.errors import ConfigurationError
from fedqueue.privacy.gaussian_dp import client_noise
from fedqueue.staleness import Staleness, built_in_staleness, constant
from fedqueue.tensors.blobs import slices
from fedqueue.tensors.manifest import Manifest

Words = npt.NDArray[np.uint32]
"""Elements of the ring, uint32."""
Fill = Callable[[Words], None]
"""Fills an array with words that are uniform and independent of each other."""

PIECE = 65_536  # words: a piece with its scratch memory stays in the processor's cache
UNWEIGHTED = ("fadas", "fedavg")
"""Strategies in which an update's staleness does not change its weight."""
ROUNDING_SHARE = 16
"""The clip norm has at least this multiple of the norm that rounding may add to an update."""


@dataclass(frozen=True)
class Ring:
    """How the updates of one run become integers; every site, keeper and coordinator computes the same."""

    clip_norm: float
    """C, the largest L2 norm of an update's delta."""
    buffer_size: int
    """K, the updates per version."""
    weight_levels: int
    """W, the largest weight of an update."""
    keepers: int
    """n"""
    parameters: int
    """d"""
    noise_multiplier: float = 0.0
    """z, of each keeper's noise; 0 without client privacy."""
    counts_examples: bool = False
    """Whether an update has one more word than parameters: its number of examples."""

    @property
    def words(self) -> int:
        """The number of words of an update, and of a sum."""
        return self.parameters + self.counts_examples

    @cached_property
    def dither(self) -> int:
        """D, the number of values of a keeper's dither; 1 is no dither."""
        return math.lcm(*range(1, self.weight_levels + 1))

    @cached_property
    def levels(self) -> int:
        """L, the largest L2 norm of a quantized update."""
        return quantization_levels(self.buffer_size, self.weight_levels, self.keepers, self.noise_multiplier)

    @property
    def most_weight(self) -> int:
        """W (K + 1), the largest sum of the weights of a version."""
        return self.weight_levels * (self.buffer_size + 1)

    @property
    def scale(self) -> float:
        """γ, the value of one unit."""
        return self.clip_norm / self.levels

    def count(self, share: float) -> int:
        """The word of an update whose share of the largest number of examples is `share`: ⌊L · share⌋."""
        return math.floor(self.levels * share)

    @property
    def clip_levels(self) -> int:
        """The norm in units that a delta is clipped to before it is rounded: rounding adds less than √d."""
        return self.levels - _rounding(self.parameters)

    def largest_norm(self, weight: int) -> float:
        """The largest L2 norm in units of the unmasked sum of updates whose weights have the sum `weight`."""
        return weight * self.levels + self.most_dither * math.sqrt(self.parameters) + self._most_noise

    @property
    def deviation(self) -> float:
        """σ = z W L, the standard deviation of each keeper's noise in units."""
        return self.noise_multiplier * self.weight_levels * self.levels

    @property
    def _most_noise(self) -> float:
        """What the norm of all keepers' noise exceeds with a probability below 10⁻⁹.

        The norm of d standard normals exceeds √d + t with a probability of at most e^(−t²/2).
        """
        quantile = math.sqrt(self.parameters) + math.sqrt(2 * math.log(1e9))
        return self.deviation * math.sqrt(self.keepers) * quantile

    @property
    def most_dither(self) -> float:
        """What the keepers' dithers change in one word of a sum at most, up or down."""
        return self.keepers * self.dither / 2

    def quantize(self, delta: npt.NDArray[np.float32], fill: Fill, share: float = 1.0) -> npt.NDArray[np.int32]:
        """The delta, clipped to C and then scaled by `share` ≤ 1, in units: int32 [d] in the memory of `delta`.

        ‖q‖ ≤ L for certain. Rounding is stochastic: q = ⌊x + r⌋ with r uniform from [0, 1), so that E[q] = x, and an x
        that is an integer, such as 0, stays as it is; `fill` makes the random words. Raises ValueError for a delta
        that is not finite, and then leaves it as it is.
        """
        norm = math.sqrt(_sum_of_squares(delta))
        if not math.isfinite(norm):
            raise ValueError("the delta is not finite")
        units = share * min(1.0 / self.scale, self.clip_levels / norm if norm else math.inf)
        quantized = delta.view(np.int32)
        words = np.empty(min(PIECE, len(delta)), np.uint32)
        squares, rough = 0, 0.0
        for where in slices(len(delta), PIECE):
            random = words[: where.stop - where.start]
            fill(random)
            exact = np.multiply(delta[where], units, dtype=np.float64)
            exact += random * 2.0**-32
            np.floor(exact, out=exact)
            quantized[where] = exact
            whole = quantized[where].astype(np.int64)
            squares += int(np.square(whole, out=whole).sum())
            rough += float(np.square(exact, out=exact).sum())
        assert rough < 2.0**62, "the exact sum of squares may have overflowed"
        assert squares <= self.levels**2, "a quantized update is longer than its bound"
        return quantized


def ring_of(config: Config, manifest: Manifest) -> Ring:
    """The ring of a run with keepers.

    Raises ConfigurationError for so large a buffer that rounding would take a noticeable part of an update.
    """
    ring = ring_for(config, manifest.parameters)
    if ring.levels < ROUNDING_SHARE * _rounding(ring.parameters):
        raise ConfigurationError(
            "aggregation.buffer_size",
            config.buffer_size,
            f"with secure.weight_levels = {ring.weight_levels} leaves {max(ring.levels, 0)} steps for an update of "
            f"{ring.parameters} parameters, whose rounding alone may take {_rounding(ring.parameters)}",
            "lower buffer_size or weight_levels",
        )
    return ring


def ring_for(config: Config, parameters: int) -> Ring:
    """The ring of a run with keepers whose model has this number of parameters, however coarse it is."""
    secure = config.secure
    return Ring(
        config.clip_norm, config.buffer_size, secure.weight_levels, len(secure.keepers), parameters,
        noise_multiplier=client_noise(config.privacy.clients) if config.privacy.clients.on else 0.0,
        counts_examples=config.sums_examples,
    )  # fmt: skip


def level(staleness: int, config: Config) -> int:
    """w = max(1, round(W s(τ))), the integer weight of an update of this staleness."""
    return max(1, round(config.secure.weight_levels * _staleness(config)(staleness)))


def examples_share(examples: int, config: Config) -> float:
    """The factor min(n, `max_examples`) / `max_examples` of a delta whose weight has the examples n; else 1."""
    most = config.secure.max_examples
    if most is None or not config.weighs_examples:
        return 1.0
    return min(examples, most) / most


def _staleness(config: Config) -> Staleness:
    if config.aggregation.strategy in UNWEIGHTED:
        return constant()
    return built_in_staleness(config.aggregation.staleness)


def _rounding(parameters: int) -> int:
    """⌈√d⌉, which bounds the L2 norm of the errors of rounding."""
    return math.ceil(math.sqrt(parameters))


def _sum_of_squares(delta: npt.NDArray[np.float32]) -> float:
    total = 0.0
    for where in slices(len(delta), PIECE):
        piece = delta[where].astype(np.float64)
        total += float(np.square(piece, out=piece).sum())  # BLAS would split the sum over threads
    return total
