"""Statistics of the attacks: correlation, ROC figures, and bootstrap intervals with a seeded generator."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.float64]
Unit = tuple[Numbers, ...]
"""What an attack gave for one update and one client: arrays of scores, such as (of members, of controls)."""

RESAMPLES = 200
LEVEL = 0.95
FALSE_POSITIVES = 0.01


def correlation(a: Numbers, b: Numbers) -> float | None:
    """Return Pearson's correlation of two vectors; None where one of them is constant."""
    a, b = a - a.mean(), b - b.mean()
    scale = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / scale if scale > 0 and np.isfinite(scale) else None


def auc(members: Numbers, controls: Numbers) -> float:
    """Return the area under the ROC curve: how often a member scores above a control; a tie counts half."""
    ordered = np.sort(controls)
    below, not_above = (np.searchsorted(ordered, members, side) for side in ("left", "right"))
    return float((below + not_above).mean() / (2 * len(controls)))


def true_positives(members: Numbers, controls: Numbers) -> float:
    """Return the share of members above the threshold that at most 1 % of the controls exceed."""
    allowed = int(FALSE_POSITIVES * len(controls))
    return float((members > np.sort(controls)[len(controls) - 1 - allowed]).mean())


def mean_of_units(statistic: Callable[..., float]) -> Callable[[Sequence[Unit]], float]:
    """Return the mean over the units of `statistic(*unit)`."""
    return lambda units: float(np.mean([statistic(*unit) for unit in units]))


def bootstrap(units: Sequence[Unit], statistic: Callable[[Sequence[Unit]], float], seed: int) -> tuple[float, float]:
    """Return the 95 % percentile interval of `statistic` over RESAMPLES resamples.

    Each resample draws units with replacement, and rows with replacement in every array of each drawn unit.
    """
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(RESAMPLES):
        drawn = (units[i] for i in rng.integers(len(units), size=len(units)))
        found.append(statistic([tuple(part[rng.integers(len(part), size=len(part))] for part in u) for u in drawn]))
    low, high = np.quantile(found, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def split_in_two(scores: Numbers, times: int, seed: int) -> list[Unit]:
    """Return `times` random divisions of `scores` into halves: controls against controls."""
    rng = np.random.default_rng(seed)
    orders = [rng.permutation(len(scores)) for _ in range(times)]
    return [(scores[order[::2]], scores[order[1::2]]) for order in orders]
