"""Noise that is correlated over versions, so that the sum of many versions has less of it: buffered linear Toeplitz.

Version t = 0 … n − 1 publishes x_t + y_t with y = C⁻¹ z, where the z_t are independent Gaussian vectors of standard
deviation σ, and C is the lower-triangular Toeplitz matrix with the first column (Dvijotham, McMahan, Pillutla,
Steinke, Thakurta, arXiv 2404.16706; McMahan, Xu, Zhang, arXiv 2408.08868)

    c_0 = 1,    c_k = Σ_i ω_i θ_i^(k − 1),    0 ≤ ω_i,  Σ ω_i ≤ 1,  0 ≤ θ_i < 1

The noise needs one vector of memory for each i: y_t = z_t − Σ_i ω_i s_i, then s_i ← θ_i s_i + y_t.

Account. A client whose contributions have the norms ℓ_u L in the versions u of a set π changes C x by at most

    L √(Σ_{u, v ∈ π} ℓ_u ℓ_v ⟨C e_u, C e_v⟩)

because C has no negative entry: aligned vectors are the worst. The release is a function of C x + z, so that μ is this
norm divided by σ, whatever the set π was. Versions that lie apart cost less than neighbouring ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.float64]

BUFFERS = 2
"""How many pairs (ω, θ) are fitted, and vectors kept: a third would lower the error by a few percent."""
_STEPS = 600  # of the search


@dataclass(frozen=True)
class Blt:
    """The matrix C of one run."""

    versions: int
    """n"""
    scales: tuple[float, ...]
    """ω"""
    decays: tuple[float, ...]
    """θ"""

    def __post_init__(self) -> None:
        if len(self.scales) != len(self.decays) or min(self.scales, default=0.0) < 0 or sum(self.scales) > 1:
            raise ValueError("each decay needs a scale, at least 0, and the scales have a sum of at most 1")
        if not all(0 <= decay < 1 for decay in self.decays):
            raise ValueError("a decay lies in [0, 1)")

    @cached_property
    def coefficients(self) -> Numbers:
        """The first column of C, float64 (n,): not negative, and not increasing."""
        steps = np.arange(self.versions - 1)
        column = np.ones(self.versions)
        column[1:] = sum(scale * decay**steps for scale, decay in zip(self.scales, self.decays, strict=True))
        return column

    @cached_property
    def inverse(self) -> Numbers:
        """The first column of C⁻¹, float64 (n,)."""
        scales = np.array(self.scales)
        # The memory after an impulse obeys s ← (diag θ − 1 ωᵀ) s; its powers are made by doubling.
        power = np.diag(self.decays) - np.ones((len(scales), 1)) * scales
        states = np.ones((len(scales), 1))
        while states.shape[1] < self.versions - 1:
            states, power = np.hstack([states, power @ states]), power @ power
        column = np.ones(self.versions)
        column[1:] = -scales @ states[:, : self.versions - 1]
        return column

    @property
    def row_norm(self) -> float:
        """The largest standard deviation of a version's noise, in multiples of σ: the norm of C⁻¹'s last row."""
        return float(np.linalg.norm(self.inverse))

    @property
    def largest_error(self) -> float:
        """The largest standard deviation of the noise in a sum of the first versions, in multiples of σ."""
        return float(np.linalg.norm(np.cumsum(self.inverse)))

    def sensitivity(self, separation: int, participations: int) -> float:
        """Return the largest √(Σ ⟨C e_u, C e_v⟩) of so many versions that lie at least `separation` apart.

        The first ones that may be taken are the worst (arXiv 2306.08153, theorem 2).
        """
        total = np.zeros(self.versions)
        for start in range(0, self.versions, separation)[:participations]:
            total[start:] += self.coefficients[: self.versions - start]
        return float(np.linalg.norm(total))

    def product(self, one: int, other: int) -> float:
        """Return ⟨C e_u, C e_v⟩ for two versions."""
        length = self.versions - max(one, other)
        apart = abs(one - other)
        return float(self.coefficients[:length] @ self.coefficients[apart : apart + length])

    def squared_sensitivity(self, loads: Mapping[int, int]) -> float:
        """Return Σ ℓ_u ℓ_v ⟨C e_u, C e_v⟩ for a client's load of each version."""
        return math.fsum(loads[one] * loads[other] * self.product(one, other) for one in loads for other in loads)

    def noise(self) -> BltNoise:
        """Return the noise of a run before its first version."""
        return BltNoise(self)


class BltNoise:
    """Makes correlated noise of independent noise, one version after the other."""

    def __init__(self, blt: Blt) -> None:
        self._blt = blt
        self._memory: list[list[Numbers]] = []  # of each piece, a vector for each buffer
        self.version = 0
        """The next version; after the horizon there is none."""

    def next(self, independent: Iterator[Numbers]) -> Iterator[Numbers]:
        """Return y_t, piece by piece, for the pieces of z_t, float64; read all of them.

        Each version has the same pieces. Raises ValueError after the last version.
        """
        if self.version >= self._blt.versions:
            raise ValueError(f"the noise was fitted to {self._blt.versions} versions")
        for at, piece in enumerate(independent):
            if at == len(self._memory):
                self._memory.append([np.zeros(len(piece)) for _ in self._blt.scales])
            memory = self._memory[at]
            made = piece - sum(scale * state for scale, state in zip(self._blt.scales, memory, strict=True))
            for decay, state in zip(self._blt.decays, memory, strict=True):
                np.multiply(state, decay, out=state)
                np.add(state, made, out=state)
            yield made
        self.version += 1


def fit_blt(versions: int, separation: int, participations: int) -> Blt:
    """Return the matrix with the least error of prefix sums at equal privacy, near enough.

    `versions` is the horizon, and a client takes part at most `participations` times, at least `separation` versions
    apart. Any other participation is private too, at the cost that the account says. The result is deterministic.
    """
    if versions < 2:
        return Blt(max(versions, 1), (0.0,) * BUFFERS, (0.0,) * BUFFERS)

    def at(point: Numbers) -> Blt:
        shares = 1 / (1 + np.exp(-np.clip(point, -30, 30)))
        decays, total, split = shares[:BUFFERS], shares[BUFFERS], shares[BUFFERS + 1]
        scales = (float(total * split), float(total * (1 - split)))
        return Blt(versions, scales, tuple(float(min(decay, 1 - 1e-9)) for decay in decays))

    def cost(point: Numbers) -> float:
        blt = at(point)
        return math.log(blt.sensitivity(separation, participations)) + math.log(blt.largest_error)

    independent = np.array([0.0, 0.0, -30.0, 0.0])
    starts = [np.array([4.0, 0.0, 0.0, -1.0]), np.array([2.0, -1.0, -1.0, 0.0]), independent]
    return at(min((_simplex_search(cost, start) for start in starts), key=cost))


def _simplex_search(cost: Callable[[Numbers], float], start: Numbers) -> Numbers:
    """The best point near `start` by the downhill simplex (Nelder and Mead, 1965)."""
    points = [start, *(start + step for step in np.eye(len(start)))]
    simplex = sorted((cost(point), tuple(point)) for point in points)
    for _ in range(_STEPS):
        best, worst = simplex[0][0], simplex[-1][0]
        if worst - best < 1e-9:
            break
        center = np.mean([point for _, point in simplex[:-1]], axis=0)
        away = center - np.array(simplex[-1][1])
        reflected = center + away
        reached = cost(reflected)
        if reached < best:
            further = center + 2 * away
            beyond = cost(further)
            simplex[-1] = min((reached, tuple(reflected)), (beyond, tuple(further)))
        elif reached < simplex[-2][0]:
            simplex[-1] = (reached, tuple(reflected))
        else:
            inner = center + (away / 2 if reached < worst else -away / 2)
            value = cost(inner)
            if value < min(reached, worst):
                simplex[-1] = (value, tuple(inner))
            else:
                first = np.array(simplex[0][1])
                shrunk = [first + (np.array(point) - first) / 2 for _, point in simplex[1:]]
                simplex[1:] = [(cost(point), tuple(point)) for point in shrunk]
        simplex.sort()
    return np.array(simplex[0][1])
