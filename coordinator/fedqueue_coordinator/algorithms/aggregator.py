"""How updates become one step of the model: FedAsync, FedBuff and FedAvg, each a frozen dataclass of pure functions.

`fadas.py`, `ca2fl.py` and `robust.py` hold further ones, `catalogue.py` finds one by its name.

Notation: x the current model at version t; an update i has base version b_i, staleness τ_i = t − b_i, delta
Δ_i = x_local,i − x_{b_i}, examples n_i. An aggregator turns K updates into a pseudo-delta Δ̄, and the server optimizer
steps with −Δ̄ as gradient (Reddi et al., arXiv 2003.00295); with SGD at rate 1 that is x ← x + Δ̄.

Floating buffers (running statistics) arrive as local values, not as deltas, and take a convex combination of the
present value and the clients', so that a variance stays positive: x_B ← x_B + Σ w_i (local_i − x_B) / divisor.
Counters take the maximum.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch

from fedqueue.tensors.frame import Delta, Frame, Manifest
from fedqueue.transport.store import BlobBuffer
from fedqueue_coordinator.algorithms.staleness import Staleness


@dataclass(frozen=True)
class Contribution:
    """One admitted update, as an aggregator sees it. `base` is the frame of its base version where it is needed.

    `delta` may be encoded where the aggregator takes pieces; `frame` is the update as a whole one.
    """

    delta: Delta
    examples: int
    staleness: int
    base: Frame | None = None
    client: str = ""

    @property
    def frame(self) -> Frame:
        return self.delta.whole()


@dataclass
class Accumulator:
    """Σ w_i · update_i so far: `floats` float32 [manifest.floats], `counters` int64 [manifest.counters]."""

    floats: torch.Tensor
    counters: torch.Tensor
    memory: BlobBuffer
    """All of it as bytes, uint8 [manifest.nbytes]: while there is no update, the first may be received right here."""
    updates: int = 0
    weights: float = 0.0
    """Σ w_i"""
    examples: int = 0
    """Σ n_i"""
    staleness: int = 0
    """max τ_i"""
    held: list[Contribution] = field(default_factory=list)
    """Updates that `finish` needs one by one; they are dropped by `clear`."""
    state: dict[str, torch.Tensor] = field(default_factory=dict)
    """What an algorithm remembers from version to version. It is committed with each version, and an update that no
    commit has acknowledged is added again after a crash: so `finish` alone may change it, `add` may not."""

    def clear(self) -> None:
        """Empty again, but for the state; the tensors are overwritten by the next update."""
        self.updates = self.examples = self.staleness = 0
        self.weights = 0.0
        self.held.clear()


@dataclass(frozen=True)
class Step:
    """What makes a version of the last one: pseudo-delta float32 [parameters], new buffers, new counters."""

    delta: torch.Tensor
    buffers: torch.Tensor
    counters: torch.Tensor


@dataclass(frozen=True)
class Aggregator:
    """`add` puts one update into the accumulator and returns its weight; `finish` turns it into a step."""

    name: str
    buffer_size: int
    add: Callable[[Accumulator, Contribution, Frame], float] = field(repr=False)
    finish: Callable[[Accumulator, Frame], Step] = field(repr=False)
    needs_base: bool = False
    """Whether `add` reads the base version of a stale update: then it stays stored until its jobs end."""
    takes_pieces: bool = False
    """Whether `add` asks for no more than `accumulate` does; else an encoded update is decoded to a frame before."""

    def init(self, manifest: Manifest) -> Accumulator:
        """An empty accumulator: as much memory as one model."""
        frame = Frame(manifest)
        return Accumulator(frame.floats, frame.counters, frame.buffer)


def fedasync(alpha: float, staleness: Staleness, mixing: Literal["model", "delta"]) -> Aggregator:
    """Xie et al., arXiv 1903.03934, algorithm 1: x ← (1 − α_t) x + α_t x_local, α_t = α · s(τ).

    As a pseudo-delta: Δ̄ = α_t (x_b + Δ − x). `mixing = "delta"` leaves the drift x_b − x out: Δ̄ = α_t Δ.
    α is a constant of the run; s(τ) applies to one update and never accumulates into it.
    """

    def add(acc: Accumulator, update: Contribution, model: Frame) -> float:
        weight = alpha * staleness(update.staleness)
        accumulate(acc, update, weight)
        if mixing == "model" and update.staleness > 0:
            assert update.base is not None
            parameters = acc.floats[: len(model.parameters)]
            parameters.add_(update.base.parameters, alpha=weight).sub_(model.parameters, alpha=weight)
        return weight

    def finish(acc: Accumulator, model: Frame) -> Step:
        return mean_step(acc, model, divisor=1.0)

    return Aggregator("fedasync", 1, add, finish, needs_base=mixing == "model", takes_pieces=True)


def fedbuff(
    buffer_size: int,
    staleness: Staleness,
    normalize: Literal["count", "weights"] = "count",
    weight_by_examples: bool = False,
    name: str = "fedbuff",
) -> Aggregator:
    """Nguyen et al., arXiv 2106.06639, algorithm 1: Δ̄ = (1/K) Σ s(τ_i) Δ_i over the K updates of the buffer.

    w_i = s(τ_i), times n_i with `weight_by_examples`. The divisor is K (or Σ n_i), so that staleness shrinks the step;
    with `normalize = "weights"` it is Σ w_i, so that staleness only shifts weight among the updates.
    """

    def add(acc: Accumulator, update: Contribution, model: Frame) -> float:
        weight = staleness(update.staleness) * (update.examples if weight_by_examples else 1)
        accumulate(acc, update, weight)
        return weight

    def finish(acc: Accumulator, model: Frame) -> Step:
        if normalize == "weights":
            return mean_step(acc, model, acc.weights)
        return mean_step(acc, model, float(acc.examples if weight_by_examples else acc.updates))

    return Aggregator(name, buffer_size, add, finish, takes_pieces=True)


def fedavg(cohort_size: int) -> Aggregator:
    """McMahan et al., arXiv 1602.05629, algorithm 1: Δ̄ = Σ n_i Δ_i / Σ n_i over one cohort, all from the same base.

    The same engine as FedBuff, behind a barrier: every staleness is 0.
    """
    return fedbuff(cohort_size, lambda tau: 1.0, "count", weight_by_examples=True, name="fedavg")


def accumulate(acc: Accumulator, update: Contribution, weight: float) -> None:
    """Add one update with its weight: one pass over it, decoded on the way, without a whole temporary."""
    delta, first = update.delta, acc.updates == 0
    edge = len(acc.floats) - len(delta.buffers)
    delta.add_to(acc.floats[:edge], weight, first)
    if first:
        torch.mul(delta.buffers, weight, out=acc.floats[edge:])
        acc.counters.copy_(delta.counters)
    else:
        acc.floats[edge:].add_(delta.buffers, alpha=weight)
        torch.maximum(acc.counters, delta.counters, out=acc.counters)
    acc.updates += 1
    acc.weights += weight
    acc.examples += update.examples
    acc.staleness = max(acc.staleness, update.staleness)


def mean_step(acc: Accumulator, model: Frame, divisor: float) -> Step:
    """What was accumulated, divided: in place, so the step's tensors are the accumulator's own."""
    parameters = len(model.parameters)
    if divisor != 1.0:
        acc.floats.div_(divisor)
    # Two terms of which neither is negative: rounding cannot bring a variance below 0, as x + (mean − x) could.
    buffers = acc.floats[parameters:].add_(model.buffers, alpha=max(0.0, 1.0 - acc.weights / divisor))
    return Step(acc.floats[:parameters], buffers, torch.maximum(acc.counters, model.counters))
