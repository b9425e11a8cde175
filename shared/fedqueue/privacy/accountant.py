"""Rényi differential privacy of the Poisson-subsampled Gaussian mechanism, and its conversion to (ε, δ).

One step includes each row with probability q, sums vectors of norm at most C, and adds Gaussian noise of standard
deviation z · C. Two data sets are neighbours if one has a row more than the other. The step has at an integer order α
(Mironov, Talwar, Zhang, arXiv 1908.10530, section 3.3)

    RDP(α) = 1 / (α − 1) · log Σ_k C(α, k) (1 − q)^(α−k) q^k exp((k² − k) / (2 z²)),    k = 0 … α

RDP adds up over steps, also where each step is chosen by what the earlier ones gave. For every α > 1 (Canonne, Kamath,
Steinke, arXiv 2004.00010, proposition 12)

    ε(δ) ≤ RDP(α) + log(1 − 1/α) − (log δ + log α) / (α − 1)
"""

from __future__ import annotations

import functools
import math

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.float64]

ORDERS = np.array([*range(2, 64), *range(64, 128, 8), *range(128, 512, 32), 512, 768, 1024])
"""The integer orders α. Orders between them would lower ε by at most 2 % for z ≥ 0.9, and by a quarter for z = 0.5."""
LARGEST_NOISE = 1e5
"""The largest noise multiplier that `noise_multiplier_for` tries."""
_LOG_FACTORIAL = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, ORDERS[-1] + 1)))])


@functools.lru_cache(maxsize=256)
def step_rdp(sampling_rate: float, noise_multiplier: float) -> Numbers:
    """Return the RDP of one step at each of ORDERS, float64; infinite where it exceeds every float.

    `sampling_rate` is q, 0 < q ≤ 1, and `noise_multiplier` is z > 0.
    """
    variance = noise_multiplier**2
    if sampling_rate >= 1.0:
        return ORDERS / (2 * variance)
    return np.array([_log_moment(int(order), sampling_rate, variance) / (order - 1) for order in ORDERS])


def _log_moment(order: int, rate: float, variance: float) -> float:
    """The logarithm of the sum above. Its terms without the exponential add up to 1, so that the rest is positive."""
    k = np.arange(2, order + 1)
    choose = _LOG_FACTORIAL[order] - _LOG_FACTORIAL[k] - _LOG_FACTORIAL[order - k]
    exponent = (k * k - k) / (2 * variance)
    log_expm1 = exponent + np.log(-np.expm1(-exponent))
    terms = choose + (order - k) * math.log1p(-rate) + k * math.log(rate) + log_expm1
    top = float(terms.max())
    return float(np.logaddexp(0.0, top + math.log(float(np.exp(terms - top).sum()))))


def epsilon_of(rdp: Numbers, delta: float) -> float:
    """Return the smallest ε at `delta` for the RDP at each of ORDERS, summed over all steps; at least 0."""
    bound = rdp + np.log1p(-1 / ORDERS) - (math.log(delta) + np.log(ORDERS)) / (ORDERS - 1)
    return max(0.0, float(bound.min()))


@functools.lru_cache(maxsize=256)
def noise_multiplier_for(epsilon: float, delta: float, sampling_rate: float, steps: int) -> float:
    """Return the smallest noise multiplier, to four digits, with which `steps` steps cost at most `epsilon`.

    Raises ValueError where no noise up to LARGEST_NOISE suffices.
    """

    def cost(noise_multiplier: float) -> float:
        return epsilon_of(steps * step_rdp(sampling_rate, noise_multiplier), delta)

    low, high = 0.0, 1.0
    while cost(high) > epsilon:
        low, high = high, 2 * high
        if high > LARGEST_NOISE:
            raise ValueError(f"no noise multiplier up to {LARGEST_NOISE:g} reaches ε = {epsilon:g} at δ = {delta:g}")
    while high - low > 1e-4 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if cost(middle) <= epsilon else (middle, high)
    return high
