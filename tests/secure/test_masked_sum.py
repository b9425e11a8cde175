"""The sum of masked updates in the accumulator's memory: exact, independent of order, and a strategy's plain sum."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedqueue.config.schema import Config
from fedqueue.secure.masks import ROUNDING, MaskStream, add_masks, weighted_mask_sum
from fedqueue.secure.ring import PIECE, Ring, Words, examples_share, level, ring_of
from fedqueue.tensors.frame import Frame
from fedqueue.tensors.manifest import Manifest
from fedqueue_coordinator.algorithms.aggregator import Aggregator
from fedqueue_coordinator.algorithms.masked_sum import MaskedSum
from fedqueue_coordinator.algorithms.registry import make_aggregator
from tests.secure.test_ring import config_of, manifest_of

KEEPERS = 2


def seeds_of(update: int) -> list[bytes]:
    return [bytes([update, component]) * 16 for component in range(KEEPERS)]


class Sum:
    """A coordinator's sum with its keepers."""

    def __init__(self, parameters: int = 40, manifest: Manifest | None = None, **changes: Any) -> None:
        self.config: Config = config_of(**changes)
        self.manifest = manifest or manifest_of(parameters)
        self.ring: Ring = ring_of(self.config, self.manifest)
        self.aggregator: Aggregator = make_aggregator(self.config)
        self.accumulator = self.aggregator.init(self.manifest)
        self.model = Frame(self.manifest)
        self.sum = MaskedSum(self.accumulator, self.ring, self.config)
        self._merged: list[tuple[int, int]] = []  # the update's number and its weight

    def add(self, number: int, quantized: Any, weight: int, examples: int = 1, staleness: int = 0) -> None:
        masked = add_masks(np.array(quantized, np.int32), seeds_of(number))
        self.sum.add([masked], weight, examples, staleness)
        self._merged.append((number, weight))

    def unmask(self, dither: int = 1) -> None:
        for keeper in range(KEEPERS):
            self.sum.subtract(self.answer(keeper, dither))

    def answer(self, keeper: int, dither: int = 1) -> Iterator[Words]:
        seeds = [seeds_of(number)[keeper] for number, _ in self._merged]
        weights = [weight for _, weight in self._merged]
        return weighted_mask_sum(seeds, weights, self.ring.parameters, bytes([keeper]) * 32, dither)

    @property
    def integers(self) -> list[int]:
        """The unmasked sum."""
        words = self.accumulator.memory[: 4 * self.ring.parameters].view(np.int32)
        return words.tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_updates_sum_exactly(sign: int) -> None:
    """K + 1 updates of weight W with the whole norm in one coordinate, and the largest dither."""
    run = Sum(parameters=3, aggregation={"buffer_size": 5})
    for number in range(6):
        run.add(number, [0, sign * run.ring.levels, 0], 8)
    run.unmask(run.ring.dither)
    dither = run.integers[1] - sign * 6 * 8 * run.ring.levels
    assert abs(dither) <= KEEPERS * run.ring.dither / 2
    assert run.sum.norm() <= run.sum.largest_norm


def test_heavier_versions_than_the_ring_allows_are_refused() -> None:
    run = Sum(aggregation={"buffer_size": 3})
    for number in range(4):
        run.add(number, [1] * 40, 8)
    with pytest.raises(AssertionError, match="exceed"):
        run.add(4, [1] * 40, 1)


@given(st.data(), st.integers(1, 5), st.integers(1, 30))
def test_the_sum_is_that_of_python_integers(data: st.DataObject, updates: int, parameters: int) -> None:
    run = Sum(parameters)
    most = run.ring.levels // parameters
    weights = data.draw(st.lists(st.integers(1, 8), min_size=updates, max_size=updates))
    element = st.integers(-most, most)
    values = [data.draw(st.lists(element, min_size=parameters, max_size=parameters)) for _ in range(updates)]
    for number, (update, weight) in enumerate(zip(values, weights, strict=True)):
        run.add(number, update, weight)
    run.unmask()
    expected = [sum(w * q for w, q in zip(weights, column, strict=True)) for column in zip(*values, strict=True)]
    assert run.integers == expected
    assert run.sum.norm() == pytest.approx(sum(x * x for x in expected) ** 0.5)


def test_the_bits_do_not_depend_on_the_order_of_arrival() -> None:
    rng = np.random.default_rng(0)
    values, weights = rng.integers(-1000, 1000, (4, 40)), [8, 3, 5, 1]
    deltas = set()
    for order in itertools.permutations(range(4)):
        run = Sum()
        for number in order:
            run.add(number, values[number], weights[number])
        run.unmask()
        deltas.add(run.sum.finish(run.aggregator, run.model).delta.numpy().tobytes())
    assert len(deltas) == 1


def test_pieces_of_any_size_make_the_same_sum() -> None:
    count = 2 * PIECE + 5
    values = np.random.default_rng(1).integers(-50, 50, count).astype(np.int32)
    sums = set()
    for sizes in ([count], [1, PIECE, PIECE + 4], [7, count - 7]):
        run = Sum(count)
        for number in range(2):
            masked = add_masks(values.copy(), seeds_of(number))
            run.sum.add(np.split(masked, np.cumsum(sizes)[:-1]), 3, 1, 0)
        sums.add(bytes(run.accumulator.memory))
    assert len(sums) == 1


def test_the_first_update_may_lie_in_the_accumulators_memory() -> None:
    beside, inside = Sum(), Sum()
    masked = add_masks(np.arange(40, dtype=np.int32), seeds_of(0))
    beside.sum.add([masked], 7, 1, 0)
    words = inside.accumulator.memory[:160].view(np.uint32)
    words[:] = masked
    inside.sum.add([words], 7, 1, 0)
    assert beside.integers == inside.integers


@pytest.mark.parametrize("length", [39, 41])
def test_an_update_of_another_length_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match="words"):
        Sum().sum.add([np.zeros(length, np.uint32)], 1, 1, 0)


def test_a_forgotten_keeper_or_a_forged_update_breaks_the_norm() -> None:
    run = Sum(parameters=10_000)
    for number in range(4):
        run.add(number, np.ones(10_000), 8)
    run.sum.subtract(run.answer(0))
    assert run.sum.norm() > run.sum.largest_norm
    run.sum.subtract(run.answer(1))
    assert run.sum.norm() <= run.sum.largest_norm

    forged = Sum(parameters=10_000)
    forged.add(0, MaskStreamed.integers(10_000), 1)
    forged.unmask()
    assert forged.sum.norm() > forged.sum.largest_norm


class MaskStreamed:
    """Integers that are uniform over the whole ring."""

    @staticmethod
    def integers(count: int) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
        words = np.empty(count, np.uint32)
        MaskStream(b"forged" * 4).next_into(words)
        return words.view(np.int32)


def test_a_cleared_sum_begins_the_next_version() -> None:
    run, fresh = Sum(), Sum()
    run.add(0, [5] * 40, 8)
    run.sum.clear()
    run._merged.clear()
    for each in (run, fresh):
        each.add(1, [2] * 40, 3)
        each.unmask()
    assert run.integers == fresh.integers == [6] * 40
    assert (run.sum.weight, run.accumulator.updates) == (3, 1)


# Strategies


def quantized(run: Sum, delta: np.ndarray[Any, Any], seed: int, share: float) -> np.ndarray[Any, np.dtype[np.int32]]:
    return run.ring.quantize(delta.astype(np.float32), MaskStream(bytes([seed]) * 32, ROUNDING).next_into, share)


@pytest.mark.parametrize(
    "changes",
    [
        {"aggregation": {"normalize": "count"}},
        {"aggregation": {"normalize": "weights"}},
        {"aggregation": {"weight_by_examples": True}, "secure": {"max_examples": 400}},
        {"aggregation": {"strategy": "fedavg", "cohort_size": 4}, "secure": {"max_examples": 400}},
        {"aggregation": {"strategy": "fadas"}},
    ],
)
def test_a_strategy_makes_the_step_of_the_plain_updates(changes: dict[str, Any]) -> None:
    """The oracle is the mean in float64 numpy; weights are the rounded staleness weights, examples are capped."""
    run = Sum(**changes)
    rng = np.random.default_rng(2)
    fedavg = run.config.aggregation.strategy == "fedavg"
    examples, stale = [100, 250, 400, 9000], [0] * 4 if fedavg else [0, 1, 3, 8]
    deltas = rng.normal(size=(4, 40)) * 0.1
    by_examples = run.config.secure.max_examples is not None
    for number, (n, tau) in enumerate(zip(examples, stale, strict=True)):
        share = examples_share(n, run.config)
        run.add(number, quantized(run, deltas[number], number, share), level(tau, run.config), n, tau)
    run.unmask(run.ring.dither)
    step = run.sum.finish(run.aggregator, run.model)

    weights = np.array([level(tau, run.config) / 8 for tau in stale])
    counted = np.minimum(examples, 400) if by_examples else np.ones(4)
    divisor = (weights * counted).sum() if run.config.aggregation.normalize == "weights" else counted.sum()
    mean = ((weights * counted)[:, None] * deltas).sum(axis=0) / divisor
    if run.config.aggregation.strategy == "fadas":  # its first step: η m / (√v + ε)
        m, v = 0.1 * mean, 0.01 * mean**2
        mean = 0.01 * m / (np.sqrt(v) + 1e-8)
    most_examples = run.config.secure.max_examples or 1
    off = (run.sum.weight + KEEPERS * run.ring.dither / 2) * run.ring.scale / 8 * most_examples / divisor
    assert step.delta.numpy() == pytest.approx(mean, rel=1e-5, abs=off), "rounding and dither, and no more"


def test_buffers_and_counters_stay_bit_for_bit() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
    manifest = Manifest.from_module(module)
    run = Sum(manifest=manifest)
    run.model.read(module)
    run.model.buffers.uniform_(-0.1, 0.1)
    run.model.counters.fill_(7)
    before = run.model.copy()
    for number in range(4):
        run.add(number, np.ones(manifest.parameters), 5)
    run.unmask()
    step = run.sum.finish(run.aggregator, run.model)
    assert step.buffers.numpy().tobytes() == before.buffers.numpy().tobytes()
    assert step.counters.tolist() == before.counters.tolist()
    assert step.delta.numpy() == pytest.approx(np.full(manifest.parameters, 5 / 8 * run.ring.scale), rel=1e-6)
