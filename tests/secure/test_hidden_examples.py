"""Numbers of examples that only a cohort's sum tells: as a masked word, behind the parameters of each update."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from fedqueue.protocol.messages import Order, Update
from fedqueue.protocol.signed_envelope import Scope
from fedqueue.secure.masked_update import Attempt, Masking
from fedqueue.secure.masks import add_masks, weighted_mask_sum
from fedqueue.secure.ring import PIECE, examples_share
from fedqueue.secure.seed_envelope import KeeperPrivateKey
from fedqueue.tensors.frame import Frame
from tests.secure.test_masked_sum import KEEPERS, Sum, quantized, seeds_of
from tests.secure.test_ring import config_of, manifest_of

FEDAVG = {"strategy": "fedavg", "cohort_size": 4}
BY_EXAMPLES = {"weight_by_examples": True, "normalize": "weights"}
MOST = 400


class Counted(Sum):
    """A sum whose updates have one word more."""

    def __init__(self, parameters: int = 40, **changes: Any) -> None:
        secure = {"max_examples": MOST, "examples": "hidden", **changes.pop("secure", {})}
        super().__init__(parameters, secure=secure, **changes)

    def add_counted(self, number: int, delta: Any, examples: int, weight: int) -> None:
        share = examples_share(examples, self.config)
        words = [*quantized(self, np.asarray(delta), number, share), self.ring.count(share)]
        self.add(number, words, weight, examples=0)

    def answer(self, keeper: int, dither: int = 1) -> Any:
        seeds = [seeds_of(number)[keeper] for number, _ in self._merged]
        weights = [weight for _, weight in self._merged]
        return weighted_mask_sum(seeds, weights, self.ring.words, bytes([keeper]) * 32, dither)


@pytest.mark.parametrize(
    ("aggregation", "weights"),
    [(FEDAVG, [8, 8, 8, 8]), (BY_EXAMPLES, [8, 5, 3, 1]), ({"strategy": "fadas", **BY_EXAMPLES}, [8, 8, 8, 8])],
    ids=["fedavg", "fedbuff", "fadas"],
)
@pytest.mark.parametrize("examples", [[100, 250, 400, 9000], [1, 1, 2, 3]])
def test_step_is_that_of_examples_that_are_told(
    aggregation: dict[str, Any], weights: list[int], examples: list[int]
) -> None:
    """The oracle is the weighted mean in exact fractions, with capped numbers."""
    run = Counted(aggregation=aggregation)
    deltas = np.random.default_rng(2).normal(size=(4, 40)) * 0.1
    for number, (n, weight) in enumerate(zip(examples, weights, strict=True)):
        run.add_counted(number, deltas[number], n, weight)
    run.unmask(run.ring.dither)
    assert run.sum.problem() == ""
    mean_before = run.sum.mean()
    step = run.sum.finish(run.aggregator, run.model)

    shares = [Fraction(w, 8) * min(n, MOST) for w, n in zip(weights, examples, strict=True)]
    mean = np.array([float(sum(s * Fraction(float(x)) for s, x in zip(shares, column, strict=True)) / sum(shares))
                     for column in deltas.astype(np.float32).T])  # fmt: skip
    divisor = float(sum(shares))
    # rounding of each update, both dithers, and what the dithers change in the divisor
    off = (run.sum.weight + run.ring.most_dither) * run.ring.scale / 8 * MOST / divisor
    relative = run.ring.most_dither / run.ring.levels / 8 * MOST / divisor + 1e-5
    assert mean_before == pytest.approx(mean, rel=relative, abs=off)
    if aggregation.get("strategy") != "fadas":
        assert step.delta.numpy() == pytest.approx(mean, rel=relative, abs=off)
    else:
        assert np.array_equal(np.sign(step.delta.numpy()), np.sign(mean_before))


def test_divisor_of_tiny_clients_is_at_least_one_example_each() -> None:
    """A largest number far above every client's: the dithers outweigh the counts, and the sum may be negative."""
    run = Counted(parameters=3, aggregation=FEDAVG, secure={"max_examples": 10**9})
    for number in range(4):
        run.add_counted(number, [0.5, 0, 0], 1, 8)
    run.unmask(run.ring.dither)
    assert run.sum.problem() == ""
    assert np.isfinite(run.sum.finish(run.aggregator, run.model).delta.numpy()).all()
    assert run.accumulator.weights >= 4


@pytest.mark.parametrize("lie", [2**30, -(2**30), 2**31 - 1])
def test_count_that_no_clients_have_spoils_the_cohort(lie: int) -> None:
    run = Counted(aggregation=FEDAVG)
    for number in range(3):
        run.add_counted(number, np.zeros(40), 100, 8)
    run.add(3, [*np.zeros(40, np.int64), np.int32(lie)], 1, examples=0)
    run.unmask(run.ring.dither)
    assert run.sum.norm() <= run.sum.largest_norm
    assert "counts examples as" in run.sum.problem()


def test_largest_counts_and_dithers_are_no_problem() -> None:
    run = Counted(aggregation=FEDAVG)
    for number in range(4):
        run.add_counted(number, np.zeros(40), MOST, 8)
    run.unmask(run.ring.dither)
    assert run.sum.problem() == ""


@pytest.mark.parametrize("parameters", [PIECE - 1, PIECE, 2 * PIECE + 4])
@pytest.mark.parametrize("first", [1, 3, PIECE])
def test_pieces_may_end_anywhere_about_the_count(parameters: int, first: int) -> None:
    runs = [Counted(parameters, aggregation=FEDAVG) for _ in range(2)]
    for number in range(2):
        words = np.arange(parameters + 1, dtype=np.int32) + number
        masked = add_masks(words, seeds_of(number))
        runs[0].sum.add([masked], 7, 0, 0)
        runs[1].sum.add([masked[:-first], masked[-first:], masked[:0]], 7, 0, 0)
    assert runs[0].integers == runs[1].integers
    assert runs[0].sum._count == runs[1].sum._count


@pytest.mark.parametrize("length", [40, 42])
def test_update_without_its_count_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match="words"):
        Counted(aggregation=FEDAVG).sum.add([np.zeros(length, np.uint32)], 1, 0, 0)


def masked(examples: int, aggregation: dict[str, Any], **secure: Any) -> tuple[Any, Any, Masking]:
    config = config_of(aggregation=aggregation, secure={"examples": "hidden", **secure})
    manifest = manifest_of(6)
    masking = Masking(config, manifest)
    update = Update(examples=examples, nbytes=24, chunks=1, seconds=0.1)
    order = Order(run="run", job="run-1", client="a", seed=1, training=config.training)
    keys = [KeeperPrivateKey.generate().public for _ in range(KEEPERS)]
    header, payload = masking.mask(update, Frame(manifest), order, Attempt(Scope("run", "i"), 1, 0, "0" * 64), keys)
    return header, payload, masking


def test_header_says_nothing_about_the_number() -> None:
    header, payload, _ = masked(37, FEDAVG, max_examples=MOST)
    assert (header.examples, header.nbytes, payload.nbytes) == (0, 28, 28)


def test_word_is_left_out_where_examples_do_not_weigh() -> None:
    header, payload, _ = masked(37, {})
    assert (header.examples, payload.nbytes) == (0, 24)
