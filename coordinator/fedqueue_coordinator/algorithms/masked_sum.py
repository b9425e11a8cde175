"""The sum of masked updates: added in the accumulator's memory, unmasked, and handed to the strategy as a plain sum.

Notation as in `fedqueue.secure.ring`. Y = Σ w_i y_i mod 2³² over the masked updates, M_k the answer of keeper k, and

    Q = Y − Σ_k M_k = Σ w_i q_i + Σ_k u_k        Σ s_i Δ_i ≈ γ Q / W,  s_i = w_i / W

A strategy that takes Σ s_i Δ_i from its accumulator (`fedbuff`, `fedavg`, `fadas`) makes its step of it unchanged.
Where examples count, a site has scaled its delta by min(n, c) / c, c = `max_examples`, and the sum is multiplied by c.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from fedqueue.config.schema import Config
from fedqueue.secure.ring import PIECE, Ring, Words, weighs_examples
from fedqueue.tensors.blobs import slices
from fedqueue.tensors.frame import Frame
from fedqueue_coordinator.algorithms.aggregator import Accumulator, Aggregator, Step


class MaskedSum:
    """Σ w_i y_i so far, in the memory of an accumulator: uint32 [parameters] in the bytes of its float32 parameters."""

    def __init__(self, accumulator: Accumulator, ring: Ring, config: Config) -> None:
        self._accumulator, self._ring = accumulator, ring
        self._most_examples = config.secure.max_examples if weighs_examples(config) else None
        self._words: Words = accumulator.memory[: 4 * ring.parameters].view(np.uint32)
        self.weight = 0
        """Σ w_i"""

    def add(self, pieces: Iterable[Words], weight: int, examples: int, staleness: int) -> None:
        """Add one masked update, which arrives as consecutive pieces, with its integer weight.

        The first update may lie in the accumulator's own memory. Raises ValueError for another number of words than
        that of the parameters; then, as where `pieces` raises, a part may have been added, and the sum is lost.
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

    @property
    def largest_norm(self) -> float:
        """The bound of `norm` where every client has clipped and every keeper has answered truly."""
        return self._ring.largest_norm(self.weight)

    def mean(self) -> npt.NDArray[np.float32]:
        """Σ s_i Δ_i / Σ s_i, float32 [parameters], once all keepers' masks are taken off."""
        return (self._words.view(np.int32) * (self._factor / self._accumulator.weights)).astype(np.float32)

    @property
    def _factor(self) -> float:
        return self._ring.scale / self._ring.weight_levels * (self._most_examples or 1)

    def finish(self, aggregator: Aggregator, model: Frame) -> Step:
        """The strategy's step for the unmasked sum; buffers and counters stay as they are in `model`."""
        factor = self._factor
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
        multiplier = np.uint32(factor % 2**32)
        scratch = np.empty(min(PIECE, len(self._words)), np.uint32)
        start = 0
        for piece in pieces:
            if start + len(piece) > len(self._words):
                raise ValueError(f"more than {len(self._words)} words")
            for part in slices(len(piece), PIECE):
                into = self._words[start + part.start : start + part.stop]
                if first:
                    np.multiply(piece[part], multiplier, out=into)
                    continue
                product = np.multiply(piece[part], multiplier, out=scratch[: part.stop - part.start])
                np.add(into, product, out=into)
            start += len(piece)
        if start != len(self._words):
            raise ValueError(f"{start} words, expected {len(self._words)}")
