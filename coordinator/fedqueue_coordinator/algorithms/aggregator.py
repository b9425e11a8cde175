"""The interface of an aggregation: K updates become one step of the model.

`fedasync.py`, `fedbuff.py`, `fedavg.py`, `fadas.py`, `ca2fl.py` and `robust.py` each make an `Aggregator`;
`registry.py` finds one by its name.

Notation: x is the current model at version t. Update i has base version b_i, staleness τ_i = t − b_i, delta Δ_i =
x_local,i − x_{b_i} and n_i examples. An aggregator turns K updates into a pseudo-delta Δ̄, and the server optimizer
steps with −Δ̄ as gradient (Reddi et al., arXiv 2003.00295). With SGD at rate 1 that is x ← x + Δ̄.

Floating buffers arrive as local values, not as deltas. A version takes a convex combination of its own value and the
clients' values, so that a variance stays positive: x_B ← x_B + Σ w_i (local_i − x_B) / divisor. Counters take the
maximum. `buffer_rules.py` replaces the result for buffers that are not averaged.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from fedqueue.tensors.blobs import BlobBuffer
from fedqueue.tensors.frame import Delta, Frame
from fedqueue.tensors.manifest import Manifest

if TYPE_CHECKING:
    from fedqueue_coordinator.algorithms.buffer_rules import MergedBuffers


def _no_doubles() -> torch.Tensor:
    return torch.empty(0, dtype=torch.float64)


@dataclass(frozen=True)
class Contribution:
    """One admitted update, as an aggregator receives it.

    >>> import torch
    >>> import fedqueue
    >>> manifest = fedqueue.Manifest.from_module(torch.nn.Linear(2, 1))  # 3 parameters
    >>> update = fedqueue.Contribution(fedqueue.Frame(manifest), examples=64, staleness=2)
    >>> update.delta.parameters
    tensor([0., 0., 0.])
    """

    delta: Delta
    """The update. It may still be encoded or in Redis if the aggregator has `takes_pieces`; else it is a `Frame`."""
    examples: int
    """n_i"""
    staleness: int
    """τ_i"""
    base: Frame | None = None
    """The frame of version b_i, where the aggregator has `needs_base`."""
    client: str = ""


@dataclass
class Accumulator:
    """Σ w_i · update_i so far: `floats` float32 [manifest.floats], `counters` int64 [manifest.counters].

    >>> import torch
    >>> import fedqueue
    >>> manifest = fedqueue.Manifest.from_module(torch.nn.Linear(2, 1))  # 3 parameters
    >>> accumulator = fedqueue.fedbuff(buffer_size=2, staleness=lambda tau: 1.0).init(manifest)
    >>> accumulator.updates, accumulator.floats.shape
    (0, torch.Size([3]))
    """

    floats: torch.Tensor
    counters: torch.Tensor
    memory: BlobBuffer
    """The bytes of `floats` and `counters`, uint8 [manifest.nbytes]. The first update may be received in them."""
    updates: int = 0
    weights: float = 0.0
    """Σ w_i"""
    examples: int = 0
    """Σ n_i"""
    staleness: int = 0
    """max τ_i"""
    contributions: list[Contribution] = field(default_factory=list)
    """Updates that `finish` needs one by one, until `clear`."""
    state: dict[str, torch.Tensor] = field(default_factory=dict)
    """Tensors that an algorithm keeps from version to version; they are committed with each version.

    Only `finish` may change them. After a crash, every update that no commit has acknowledged is added again: a change
    by `add` would be made twice.
    """
    doubles: torch.Tensor = field(default_factory=_no_doubles)
    """Σ w_i · float64 buffers so far, float64 [manifest.doubles]."""
    merged_buffers: MergedBuffers | None = None
    """What the rules of buffers need; None before the first update."""

    def clear(self) -> None:
        """Empty the accumulator, except for `state`. The next update overwrites the tensors."""
        self.updates = 0
        self.weights = 0.0
        self.examples = 0
        self.staleness = 0
        self.contributions.clear()
        self.merged_buffers = None


@dataclass(frozen=True)
class Step:
    """The next version: pseudo-delta float32 [parameters], new buffers float32, new counters int64.

    `doubles`: new float64 buffers; without it they stay as they are.

    >>> import torch
    >>> import fedqueue
    >>> step = fedqueue.Step(torch.tensor([0.5, -0.5]), torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    >>> torch.zeros(2) + step.delta  # what the server optimizer does with SGD at rate 1
    tensor([ 0.5000, -0.5000])
    """

    delta: torch.Tensor
    buffers: torch.Tensor
    counters: torch.Tensor
    doubles: torch.Tensor | None = None


@dataclass(frozen=True)
class Aggregator:
    """Two functions: `add` puts one update into the accumulator and returns its weight; `finish` makes the step.

    A factory of your own takes a `Config` and `aggregation.strategy_options`, and returns an `Aggregator`. Name it in
    `aggregation.strategy` as `path/to/file.py:factory` or `package.module:factory`.

    >>> import fedqueue
    >>> def halved(config: fedqueue.Config, factor: float = 0.5) -> fedqueue.Aggregator:
    ...     mean = fedqueue.fedbuff(config.buffer_size, staleness=lambda tau: 1.0)
    ...     def finish(accumulator: fedqueue.Accumulator, model: fedqueue.Frame) -> fedqueue.Step:
    ...         step = mean.finish(accumulator, model)
    ...         step.delta.mul_(factor)
    ...         return step
    ...     return fedqueue.Aggregator("halved", config.buffer_size, mean.add, finish)
    >>> config = fedqueue.Config(task={"entrypoint": "task.py:Mine"}, stop={"versions": 1})
    >>> halved(config)
    Aggregator(name='halved', buffer_size=4, needs_base=False, takes_pieces=False)
    """

    name: str
    buffer_size: int
    """K, the updates per version."""
    add: Callable[[Accumulator, Contribution, Frame], float] = field(repr=False)
    finish: Callable[[Accumulator, Frame], Step] = field(repr=False)
    needs_base: bool = False
    """Whether `add` reads the base version of a stale update. Base versions then stay stored until their jobs end."""
    takes_pieces: bool = False
    """Whether `add` can consume a delta piece by piece (it never calls `whole()`). Else each delta is decoded first."""

    def init(self, manifest: Manifest) -> Accumulator:
        """Make an empty accumulator; it takes as much memory as one model."""
        frame = Frame(manifest)
        return Accumulator(frame.floats, frame.counters, frame.buffer, doubles=frame.doubles)


def accumulate(acc: Accumulator, update: Contribution, weight: float) -> None:
    """Add one update with its weight: one pass, which decodes piece by piece and needs no copy of the whole update.

    `acc` must be empty or contain updates of the same manifest.

    >>> import torch
    >>> import fedqueue
    >>> model = fedqueue.Frame(fedqueue.Manifest.from_module(torch.nn.Linear(2, 1)))
    >>> accumulator = fedqueue.fedbuff(2, lambda tau: 1.0).init(model.manifest)
    >>> update = fedqueue.Frame(model.manifest)
    >>> update.parameters.fill_(1.0)
    tensor([1., 1., 1.])
    >>> fedqueue.accumulate(accumulator, fedqueue.Contribution(update, examples=8, staleness=0), weight=0.5)
    >>> accumulator.floats, accumulator.weights
    (tensor([0.5000, 0.5000, 0.5000]), 0.5)
    """
    delta = update.delta
    first = acc.updates == 0
    edge = len(acc.floats) - len(delta.buffers)
    delta.add_to(acc.floats[:edge], weight, first)
    if first:
        torch.mul(delta.buffers, weight, out=acc.floats[edge:])
        if len(acc.doubles):
            torch.mul(delta.doubles, weight, out=acc.doubles)
        acc.counters.copy_(delta.counters)
    else:
        acc.floats[edge:].add_(delta.buffers, alpha=weight)
        if len(acc.doubles):
            acc.doubles.add_(delta.doubles, alpha=weight)
        torch.maximum(acc.counters, delta.counters, out=acc.counters)
    acc.updates += 1
    acc.weights += weight
    acc.examples += update.examples
    acc.staleness = max(acc.staleness, update.staleness)


def mean_step(acc: Accumulator, model: Frame, divisor: float) -> Step:
    """Divide the accumulated sum in place: the tensors of the step are the accumulator's own.

    >>> import torch
    >>> import fedqueue
    >>> model = fedqueue.Frame(fedqueue.Manifest.from_module(torch.nn.Linear(2, 1)))
    >>> accumulator = fedqueue.fedbuff(2, lambda tau: 1.0).init(model.manifest)
    >>> accumulator.floats.fill_(3.0)
    tensor([3., 3., 3.])
    >>> fedqueue.mean_step(accumulator, model, divisor=2.0).delta
    tensor([1.5000, 1.5000, 1.5000])
    """
    parameters = len(model.parameters)
    if divisor != 1.0:
        acc.floats.div_(divisor)
    # The sum of two non-negative terms: rounding cannot bring a variance below 0, as x + (mean − x) could.
    kept = max(0.0, 1.0 - acc.weights / divisor)
    buffers = acc.floats[parameters:].add_(model.buffers, alpha=kept)
    doubles = acc.doubles.div_(divisor).add_(model.doubles, alpha=kept) if len(acc.doubles) else acc.doubles
    return Step(acc.floats[:parameters], buffers, torch.maximum(acc.counters, model.counters), doubles)
