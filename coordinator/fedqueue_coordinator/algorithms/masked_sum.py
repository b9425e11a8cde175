"""The sum of masked updates: added in the accumulator's memory, unmasked, and handed to the strategy as a plain sum.

Notation as in `fedqueue.secure.ring`. Y = Σ w_i y_i mod 2³² over the masked updates, M_k the answer of keeper k, and

    Q = Y − Σ_k M_k = Σ w_i q_i + Σ_k u_k        Σ s_i Δ_i ≈ γ Q / W,  s_i = w_i / W

A strategy that takes Σ s_i Δ_i from its accumulator (`fedbuff`, `fedavg`, `fadas`) makes its step of it unchanged.
Where examples count, a site has scaled its delta by n̂ = min(n, c) / c, c = `max_examples`, and the sum is multiplied by
c. Where their number is hidden, the last word of Q is ≈ L Σ w_i n̂_i, and the step is Σ s_i n_i Δ_i / Σ s_i n_i.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from fedqueue.config.schema import Config
from fedqueue.secure.ring import PIECE, Ring, Words
from fedqueue.tensors.blobs import slices
from fedqueue.tensors.frame import Frame
from fedqueue_coordinator.algorithms.aggregator import Accumulator, Aggregator, Step


class MaskedSum:
    """Σ w_i y_i so far, in the memory of an accumulator: uint32 [parameters] in the bytes of its float32 parameters."""

    def __init__(self, accumulator: Accumulator, ring: Ring, config: Config) -> None:
        self._accumulator, self._ring = accumulator, ring
        self._most_examples = config.secure.max_examples if config.weighs_examples else None
        self._words: Words = accumulator.memory[: 4 * ring.parameters].view(np.uint32)
        self._count: Words = np.zeros(ring.words - ring.parameters, np.uint32)
        self.weight = 0
        """Σ w_i"""

    def add(self, pieces: Iterable[Words], weight: int, examples: int, staleness: int) -> None:
        """Add one masked update, which arrives as consecutive pieces, with its integer weight.

        The first update may lie in the accumulator's own memory. Raises ValueError for another number of words than
        that of the ring; then, as where `pieces` raises, a part may have been added, and the sum is lost.
        """
        assert self.weight + weight <= self._ring.most_weight, "a version's weights exceed the ring's bound"
        accumulator = self._accumulator
        self._combine(pieces, weight, first=accumulator.updates == 0)
        counted = examples if self._most_examples is None else min(examples, self._most_examples)
        self.weight += weight
        accumulator.updates += 1
        accumulator.weights += self._share(weight) * (1 if self._most_examples is None else counted)
        accumulator.examples += counted
        accumulator.staleness = max(accumulator.staleness, staleness)

    def subtract(self, pieces: Iterable[Words]) -> None:
        """Take off one keeper's sum of masks, which arrives as consecutive pieces; raises as `add`."""
        self._combine(pieces, -1, first=False)

    def norm(self) -> float:
        """‖Q‖ in units of the ring, once all keepers' masks are taken off."""
        signed, squares = self._words.view(np.int32), 0.0
        for where in slices(len(signed), PIECE):
            piece = signed[where].astype(np.float64)
            squares += float(np.square(piece, out=piece).sum())
        return math.sqrt(squares)

    def problem(self) -> str:
        """Say what no sum of clipped updates and true masks has, once all masks are taken off; else an empty string."""
        norm, most = self.norm(), self.largest_norm
        if norm > most:
            return f"the sum of its cohort has the norm {norm:.4g}, and that of clipped updates is at most {most:.4g}"
        dither, largest = self._ring.most_dither, self.weight * self._ring.levels
        if any(not -dither <= count <= largest + dither for count in self._count.view(np.int32)):
            return f"the sum of its cohort counts examples as {self._count.view(np.int32)[0]} of at most {largest}"
        return ""

    @property
    def largest_norm(self) -> float:
        """The bound of `norm` where every client has clipped and every keeper has answered truly."""
        return self._ring.largest_norm(self.weight)

    def mean(self) -> npt.NDArray[np.float32]:
        """Σ s_i Δ_i / Σ s_i, float32 [parameters], once all keepers' masks are taken off."""
        weights = self._hidden_examples if self._ring.counts_examples else self._accumulator.weights
        return (self._words.view(np.int32) * (self._factor / weights)).astype(np.float32)

    @property
    def _factor(self) -> float:
        return self._ring.scale / self._ring.weight_levels * (self._most_examples or 1)

    @property
    def _hidden_examples(self) -> float:
        """Σ s_i n_i as the last word of the sum says it; at least Σ s_i, because each update has an example."""
        assert self._most_examples is not None
        told = int(self._count.view(np.int32)[0]) / self._ring.levels / self._ring.weight_levels * self._most_examples
        return max(told, self._share(self.weight))

    def _divide_by_hidden_examples(self) -> float:
        """Give the accumulator a whole number of examples as both divisors; returns the factor that makes up for it."""
        exact = self._hidden_examples
        self._accumulator.examples = max(1, round(exact))
        self._accumulator.weights = float(self._accumulator.examples)
        return self._accumulator.examples / exact

    def finish(self, aggregator: Aggregator, model: Frame) -> Step:
        """The strategy's step for the unmasked sum; buffers and counters stay as they are in `model`."""
        factor = self._factor
        if self._ring.counts_examples:
            factor *= self._divide_by_hidden_examples()
        signed = self._words.view(np.int32)
        floats = self._words.view(np.float32)
        for where in slices(len(signed), PIECE):
            floats[where] = signed[where] * factor
        self._accumulator.floats[self._ring.parameters :].zero_()
        self._accumulator.counters.zero_()
        self._accumulator.doubles.zero_()
        step = aggregator.finish(self._accumulator, model)
        return replace(step, buffers=model.buffers, counters=model.counters, doubles=None)

    def clear(self) -> None:
        """Forget the updates: begin the next version's sum."""
        self.weight = 0
        self._accumulator.clear()

    def _share(self, weight: int) -> float:
        return weight / self._ring.weight_levels

    def _combine(self, pieces: Iterable[Words], factor: int, first: bool) -> None:
        """words ← factor · piece where it is the first, else words + factor · piece, mod 2³²."""
        multiplier, parameters = np.uint32(factor % 2**32), self._ring.parameters
        scratch = np.empty(min(PIECE, parameters), np.uint32)
        start = 0
        for piece in pieces:
            end = start + len(piece)
            if end > self._ring.words:
                raise ValueError(f"more than {self._ring.words} words")
            inside = max(0, min(len(piece), parameters - start))
            for part in slices(inside, PIECE):
                into = self._words[start + part.start : start + part.stop]
                if first:
                    np.multiply(piece[part], multiplier, out=into)
                    continue
                product = np.multiply(piece[part], multiplier, out=scratch[: part.stop - part.start])
                np.add(into, product, out=into)
            if inside < len(piece):
                self._count[:] = (0 if first else self._count) + piece[inside:] * multiplier
            start = end
        if start != self._ring.words:
            raise ValueError(f"{start} words, expected {self._ring.words}")
