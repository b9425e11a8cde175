"""Implements the papers' formulas in float64 numpy, deliberately independent of the code that they check.

x, base and delta are float64 arrays of one shape; tau is the staleness, n the number of examples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

STALENESS: dict[str, Callable[..., float]] = {
    "constant": lambda tau: 1.0,
    "polynomial": lambda tau, a=0.5: 1.0 / math.pow(tau + 1, a),
    "hinge": lambda tau, a=10.0, b=4.0: 1.0 if tau <= b else 1.0 / (1.0 + a * (tau - b)),
    "exponential": lambda tau, a=0.1: math.exp(-tau * a),
}
"""Constant, polynomial and hinge: Xie et al., arXiv 1903.03934, section 5.2."""


def fedasync(x: Array, base: Array, delta: Array, alpha: float, s: float, mixing: str) -> Array:
    """arXiv 1903.03934, algorithm 1: x_t = (1 − α_t) x_{t−1} + α_t x_new; or x_{t−1} + α_t Δ, by `mixing`."""
    alpha_t = alpha * s
    if mixing == "delta":
        return x + alpha_t * delta
    x_new = base + delta
    return (1 - alpha_t) * x + alpha_t * x_new


@dataclass(frozen=True)
class Arrived:
    delta: Array
    tau: int
    n: int


def fedbuff(updates: Sequence[Arrived], s: Callable[[int], float], normalize: str, by_examples: bool) -> Array:
    """arXiv 2106.06639, algorithm 1: the mean of the weighted deltas."""
    if by_examples:
        weights = [s(u.tau) * u.n for u in updates]
        whole = sum(u.n for u in updates)
    else:
        weights = [s(u.tau) for u in updates]
        whole = len(updates)
    divisor = sum(weights) if normalize == "weights" else whole
    return sum(w * u.delta / divisor for w, u in zip(weights, updates, strict=True))  # type: ignore[return-value]


def fedavg(models: Sequence[Array], examples: Sequence[int]) -> Array:
    """arXiv 1602.05629, algorithm 1: w_{t+1} = Σ (n_k / n) w_k, over whole models and not over deltas."""
    n = sum(examples)
    return sum(n_k / n * w_k for w_k, n_k in zip(models, examples, strict=True))  # type: ignore[return-value]


def mix_buffers(x: Array, clients: Sequence[Array], shares: Sequence[float]) -> Array:
    """Mix running statistics: the current value has weight 1 − Σ shares."""
    return (1 - sum(shares)) * x + sum(s * value for s, value in zip(shares, clients, strict=True))


# Server optimizers, arXiv 2003.00295: the gradient is −Δ̄


@dataclass
class SGD:
    lr: float = 1.0
    momentum: float = 0.0
    velocity: Any = 0.0

    def step(self, x: Array, delta: Array) -> Array:
        self.velocity = self.momentum * self.velocity + delta
        return x + self.lr * self.velocity  # type: ignore[no-any-return]


@dataclass
class Adam:
    """Kingma and Ba, arXiv 1412.6980, algorithm 1; `decay` is decoupled, as in arXiv 1711.05101, algorithm 2."""

    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    decay: float = 0.0
    m: Any = 0.0
    v: Any = 0.0
    t: int = 0

    def step(self, x: Array, delta: Array) -> Array:
        g = -delta
        self.t += 1
        b1, b2 = self.betas
        self.m = b1 * self.m + (1 - b1) * g
        self.v = b2 * self.v + (1 - b2) * g * g
        m_hat = self.m / (1 - b1**self.t)
        v_hat = self.v / (1 - b2**self.t)
        stepped: Array = x - self.lr * self.decay * x - self.lr * m_hat / (np.sqrt(v_hat) + self.eps)
        return stepped


@dataclass
class Adagrad:
    """Duchi et al. 2011, diagonal version: one sum of squares for each parameter."""

    lr: float
    eps: float = 1e-10
    squares: Any = 0.0

    def step(self, x: Array, delta: Array) -> Array:
        self.squares = self.squares + delta**2
        return x + self.lr * delta / (np.sqrt(self.squares) + self.eps)  # type: ignore[no-any-return]


# Further aggregations


@dataclass
class FADAS:
    """arXiv 2407.18365, algorithm 1 with the delay-adaptive rate of its equation (2)."""

    lr: float
    betas: tuple[float, float]
    eps: float
    threshold: int
    m: Any = 0.0
    v: Any = 0.0
    v_hat: Any = 0.0

    def step(self, x: Array, deltas: Sequence[Array], taus: Sequence[int]) -> Array:
        delta = sum(deltas) / len(deltas)
        b1, b2 = self.betas
        self.m = b1 * self.m + (1 - b1) * delta
        self.v = b2 * self.v + (1 - b2) * delta**2
        self.v_hat = np.maximum(self.v_hat, self.v)
        slow = max(taus)
        rate = self.lr if slow <= self.threshold else min(self.lr, 1 / slow)
        return x + rate * self.m / (np.sqrt(self.v_hat) + self.eps)  # type: ignore[no-any-return]


@dataclass
class CA2FL:
    """ICLR 2024, algorithm 2; computes h as the mean of the whole table of h_i each time, and not incrementally."""

    h: dict[str, Array]

    def step(self, x: Array, arrived: Sequence[tuple[str, Array]]) -> Array:
        mean = sum(self.h.values()) / len(self.h)
        x = x + mean + sum(delta - self.h[client] for client, delta in arrived) / len(arrived)
        self.h.update(dict(arrived))
        return x


# Robust means of the rows of a matrix


def trimmed_mean(rows: Array, f: int) -> Array:
    """arXiv 1803.01498, definition 2: the coordinate-wise trimmed mean."""
    return np.array([np.mean(sorted(column)[f : len(column) - f]) for column in rows.T])


def krum(rows: Array, f: int, keep: int) -> Array:
    """arXiv 1703.02757: the score of a row is the sum over its n − f − 2 nearest other rows."""
    n = len(rows)
    scores = []
    for i in range(n):
        others = sorted(float(np.sum((rows[i] - rows[j]) ** 2)) for j in range(n) if j != i)
        scores.append(sum(others[: n - f - 2]))
    best = np.argsort(scores, kind="stable")[:keep]
    return rows[best].mean(axis=0)  # type: ignore[no-any-return]


def geometric_median(rows: Array) -> Array:
    """Minimize the convex `total_distance` by Weiszfeld's iteration on the points themselves."""
    z = rows.mean(axis=0)
    for _ in range(1000):
        weights = 1 / np.maximum(np.linalg.norm(rows - z, axis=1), 1e-9)
        z = weights @ rows / weights.sum()
    return z  # type: ignore[no-any-return]


def total_distance(rows: Array, z: Array) -> float:
    return float(np.linalg.norm(rows - z, axis=1).sum())


def clipped_mean(rows: Array, limit: float) -> Array:
    """arXiv 1911.07963, section 4: the mean of norm-clipped rows."""
    norms = np.linalg.norm(rows, axis=1)
    limit = limit or float(np.median(norms))
    mean: Array = np.mean([row / max(1.0, norm / limit) for row, norm in zip(rows, norms, strict=True)], axis=0)
    return mean
