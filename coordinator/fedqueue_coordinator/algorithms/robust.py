"""Byzantine-robust aggregation of a buffer: FedBuff's mean is replaced by a robust center.

The K updates are the vectors s(τ_i) Δ_i, so their arithmetic mean is FedBuff's own step. A rule either computes a
center by coordinate, or gives each update a weight. Running statistics follow the same rule, on
x_B + s(τ_i) (local_i − x_B), and counters take the median. `buffer_rules.py` has the other buffers.

A hostile client may state any number of examples, so no rule weighs by examples.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from fedqueue.config.aggregation import RobustConfig
from fedqueue.staleness import Staleness
from fedqueue.tensors.frame import Frame
from fedqueue_coordinator.algorithms.aggregator import Accumulator, Aggregator, Contribution, Step
from fedqueue_coordinator.algorithms.deterministic_reductions import blocks, inner_product, squared_distances

Centre = Callable[[torch.Tensor], torch.Tensor]
"""float32 or float64 [K, block] → the same dtype [block]; the function may overwrite its argument."""


@dataclass(frozen=True)
class Weights:
    """The weight of each update, for the parameters and for the running statistics; the latter sum to 1."""

    parameters: Sequence[float]
    statistics: Sequence[float]


Weigh = Callable[[Sequence[torch.Tensor], Sequence[float]], Weights]
"""The K deltas, float32 [parameters], with their s(τ_i) → their weights."""


@dataclass(frozen=True)
class Rule:
    """A robust rule. Exactly one of `centre` (by coordinate) and `weigh` (weights of whole updates) is set."""

    name: str
    centre: Centre | None = None
    weigh: Weigh | None = None


# By coordinate: Yin et al., arXiv 1803.01498, definitions 1 and 2


def median(rows: torch.Tensor) -> torch.Tensor:
    """Return the median of each column; for an even number of rows, the mean of the two middle values."""
    ordered, count = rows.sort(dim=0).values, len(rows)
    return ordered[count // 2] if count % 2 else (ordered[count // 2 - 1] + ordered[count // 2]) / 2


def trimmed_mean(f: int) -> Centre:
    """Make the mean of each column without its f least and f greatest values; a shorter buffer is trimmed less."""

    def centre(rows: torch.Tensor) -> torch.Tensor:
        trim = min(f, (len(rows) - 1) // 2)
        kept = rows.sort(dim=0).values[trim : len(rows) - trim]
        for row in kept[1:]:  # in a fixed order, which decides the last bits of a sum
            kept[0].add_(row)
        return kept[0].div_(len(kept))

    return centre


# By weights


def krum(f: int, keep: int | None) -> Weigh:
    """Blanchard et al., NeurIPS 2017, arXiv 1703.02757: choose the update closest to its K − f − 2 nearest
    neighbors.

    Multi-Krum is the mean of the `keep` best updates (None: of K − f). A tie goes to the earlier update.
    """

    def weigh(deltas: Sequence[torch.Tensor], scales: Sequence[float]) -> Weights:
        count = len(deltas)
        nearest = max(1, count - f - 2)
        distances = squared_distances(deltas, scales).tolist()
        scores = [math.fsum(sorted(row[:i] + row[i + 1 :])[:nearest]) for i, row in enumerate(distances)]
        chosen = sorted(range(count), key=lambda i: (scores[i], i))[: keep or max(1, count - f)]
        weights = [1 / len(chosen) if i in chosen else 0.0 for i in range(count)]
        return Weights(weights, weights)

    return weigh


def geometric_median(iterations: int, smoothing: float, tolerance: float = 1e-9) -> Weigh:
    """Approximate the z with the least Σ ‖z − v_i‖ by the smoothed Weiszfeld algorithm (RFA, arXiv 1912.13445, alg. 2).

    z = Σ λ_i v_i and λ_i ∝ 1 / max(ν, ‖z − v_i‖), from λ = 1/K until no λ changes by more than `tolerance`. The
    distances follow from those between the updates, so an iteration costs K² operations and no pass over the vectors:
    ‖z − v_i‖² = Σ_j λ_j D_ij − ½ Σ_jk λ_j λ_k D_jk.
    """

    def weigh(deltas: Sequence[torch.Tensor], scales: Sequence[float]) -> Weights:
        squares = squared_distances(deltas, scales)
        shares = torch.full((len(deltas),), 1 / len(deltas), dtype=torch.float64)
        for _ in range(iterations):
            towards = (squares * shares).sum(dim=1)
            distances = (towards - (towards * shares).sum() / 2).clamp_min(0).sqrt().clamp_min(smoothing)
            closer = 1 / distances
            closer = closer / closer.sum()
            moved = float((closer - shares).abs().max())
            shares = closer
            if moved <= tolerance:
                break
        return Weights(shares.tolist(), shares.tolist())

    return weigh


def norm_clipping(clip_norm: float | None) -> Weigh:
    """Clip each delta to the norm C = `clip_norm` (None: the buffer's median norm): weight min(1, C / ‖s Δ‖) / K.

    Sun et al., arXiv 1911.07963, §4. Clipping bounds the effect of one update; it does not identify a hostile one.
    Running statistics are averaged without clipping.
    """

    def weigh(deltas: Sequence[torch.Tensor], scales: Sequence[float]) -> Weights:
        count = len(deltas)
        norms = [s * math.sqrt(inner_product(d, d)) for d, s in zip(deltas, scales, strict=True)]
        limit = clip_norm or statistics.median(norms)
        return Weights([min(1.0, limit / n) / count if n else 1 / count for n in norms], [1 / count] * count)

    return weigh


RULES: dict[str, Callable[[RobustConfig], Rule]] = {
    "mean": lambda c: Rule("mean", centre=trimmed_mean(0)),
    "median": lambda c: Rule("median", centre=median),
    "trimmed_mean": lambda c: Rule("trimmed_mean", centre=trimmed_mean(c.byzantine)),
    "krum": lambda c: Rule("krum", weigh=krum(c.byzantine, 1)),
    "multi_krum": lambda c: Rule("multi_krum", weigh=krum(c.byzantine, c.keep)),
    "geometric_median": lambda c: Rule("geometric_median", weigh=geometric_median(c.iterations, c.smoothing)),
    "norm_clipping": lambda c: Rule("norm_clipping", weigh=norm_clipping(c.clip_norm)),
}


def make_rule(config: RobustConfig) -> Rule:
    """Make the configured rule; the configuration has checked that it suits the buffer size."""
    return RULES[config.rule](config)


def robust_fedbuff(buffer_size: int, staleness: Staleness, rule: Rule) -> Aggregator:
    """FedBuff over K = `buffer_size` updates, with `rule` instead of the mean.

    Memory: the K updates and one accumulator, that is K + 1 models, and K blocks of 16,384 float32 numbers.
    """

    def add(acc: Accumulator, update: Contribution, model: Frame) -> float:
        acc.contributions.append(update)
        acc.updates += 1
        acc.staleness = max(acc.staleness, update.staleness)
        return staleness(update.staleness)

    def finish(acc: Accumulator, model: Frame) -> Step:
        frames = [update.delta.whole() for update in acc.contributions]
        scales = [staleness(update.staleness) for update in acc.contributions]
        if rule.weigh:
            _mix(acc, frames, scales, rule.weigh([frame.parameters for frame in frames], scales), model)
        else:
            assert rule.centre is not None
            _take_centre(acc, frames, scales, rule.centre, model)
        counters = torch.stack([frame.counters for frame in frames]).median(dim=0).values
        parameters = len(model.parameters)
        counters = torch.maximum(counters, model.counters)
        return Step(acc.floats[:parameters], acc.floats[parameters:], counters, acc.doubles)

    return Aggregator("fedbuff", buffer_size, add, finish)


def _mix(acc: Accumulator, frames: list[Frame], scales: list[float], weights: Weights, model: Frame) -> None:
    edge = len(model.parameters)
    parameters, buffers = acc.floats[:edge].zero_(), acc.floats[edge:].zero_()
    acc.doubles.zero_()
    kept = 1.0
    for frame, scale, p, b in zip(frames, scales, weights.parameters, weights.statistics, strict=True):
        if p:  # an update of weight 0 must have no influence at all
            parameters.add_(frame.parameters, alpha=p * scale)
        if b:
            buffers.add_(frame.buffers, alpha=b * scale)
            acc.doubles.add_(frame.doubles, alpha=b * scale)
        kept -= b * scale
    buffers.add_(model.buffers, alpha=max(0.0, kept))
    acc.doubles.add_(model.doubles, alpha=max(0.0, kept))


def _take_centre(acc: Accumulator, frames: list[Frame], scales: list[float], centre: Centre, model: Frame) -> None:
    edge = len(model.parameters)
    rows = torch.empty(len(frames), 0)
    for part in blocks(len(acc.floats)):
        length = part.stop - part.start
        if rows.shape[1] != length:
            rows = torch.empty(len(frames), length)
        for row, frame, scale in zip(rows, frames, scales, strict=True):
            torch.mul(frame.floats[part], scale, out=row)
            if part.stop > edge and scale < 1.0:  # 1 − s(τ) of the weight stays with the model's own statistics
                start = max(part.start, edge)
                row[start - part.start :].add_(model.floats[start : part.stop], alpha=1.0 - scale)
        torch.add(centre(rows), 0.0, out=acc.floats[part])
    if len(acc.doubles):
        weighted = zip(frames, scales, strict=True)
        doubles = torch.stack([f.doubles * scale + model.doubles * (1.0 - scale) for f, scale in weighted])
        acc.doubles.copy_(centre(doubles))
