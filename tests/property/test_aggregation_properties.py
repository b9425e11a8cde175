"""Properties of every aggregation on random updates: bounds, symmetries, and agreement with the oracle."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedqueue.config.aggregation import ServerOptimizerConfig, StalenessConfig
from fedqueue.tensors.frame import Frame
from fedqueue_coordinator.algorithms.aggregator import Contribution
from fedqueue_coordinator.algorithms.registry import make_aggregator
from fedqueue_coordinator.algorithms.server_optimizer import ServerOptimizer
from fedqueue_coordinator.algorithms.staleness import make_staleness
from tests.support import oracle
from tests.support.builders import make_config, make_frame, same_bits

values = st.floats(-1000, 1000, width=32)
variances = st.floats(2.0**-30, 2.0**30, width=32)
taus = st.integers(0, 100)
functions = st.builds(
    StalenessConfig,
    function=st.sampled_from(sorted(oracle.STALENESS)),
    a=st.none() | st.floats(1e-3, 1e3),
    b=st.none() | st.floats(0, 50),
)
contributions = st.builds(
    lambda parameters, mean, variance, steps, examples, tau: Contribution(
        make_frame(parameters, mean, variance, steps), examples, tau
    ),
    st.tuples(values, values), values, variances, st.integers(0, 2**40), st.integers(1, 10**6), taus,
)  # fmt: skip
buffers = st.lists(contributions, min_size=1, max_size=6)
models = st.builds(make_frame, st.tuples(values, values), values, variances, st.integers(0, 2**40))
divisors = st.fixed_dictionaries(
    {"normalize": st.sampled_from(["count", "weights"]), "weight_by_examples": st.booleans()}
)
alphas = st.floats(0.01, 1.0)


def merge(aggregation: dict[str, Any], model: Frame, contributions_: list[Contribution]) -> Frame:
    """Make the version after `model`, with plain addition as the server optimizer."""
    aggregator = make_aggregator(make_config(aggregation=aggregation))
    after, accumulator = model.copy(), aggregator.init(model.manifest)
    for contribution in contributions_:
        aggregator.add(accumulator, contribution, after)
    ServerOptimizer(ServerOptimizerConfig(), after).step(aggregator.finish(accumulator, after))
    return after


def fedbuff(**options: Any) -> dict[str, Any]:
    return {"strategy": "fedbuff", **options}


def frame_of(contribution: Contribution) -> Frame:
    """Return the delta, which these tests make as a whole frame."""
    assert isinstance(contribution.delta, Frame)
    return contribution.delta


def arrived_of(c: Contribution) -> oracle.Arrived:
    return oracle.Arrived(frame_of(c).parameters.numpy().astype(np.float64), c.staleness, c.examples)


def deltas(contributions_: list[Contribution]) -> NDArray[Any]:
    return np.array([frame_of(c).parameters.numpy() for c in contributions_], np.float64)


@given(functions, taus)
def test_staleness_weights_are_between_0_and_1_and_never_rise(function: StalenessConfig, tau: int) -> None:
    s = make_staleness(function)
    assert s(0) == 1.0
    assert 0 < s(tau + 1) <= s(tau) <= 1


@given(models, buffers, divisors, functions)
def test_fedbuff_agrees_with_the_oracle(
    model: Frame, buffer: list[Contribution], divisor: dict[str, Any], function: StalenessConfig
) -> None:
    s = make_staleness(function)
    arrived = [
        oracle.Arrived(frame_of(c).parameters.numpy().astype(np.float64), c.staleness, c.examples) for c in buffer
    ]
    x = model.parameters.numpy().astype(np.float64)
    expected = x + oracle.fedbuff(arrived, s, divisor["normalize"], divisor["weight_by_examples"])
    merged = merge(fedbuff(staleness=function, **divisor), model, buffer)
    np.testing.assert_allclose(merged.parameters.numpy(), expected, rtol=1e-5, atol=2e-3)  # for values up to 1000


@given(models, contributions, models, alphas, functions, st.sampled_from(["model", "delta"]))
def test_fedasync_agrees_with_the_oracle(
    model: Frame, update: Contribution, base: Frame, alpha: float, function: StalenessConfig, mixing: str
) -> None:
    base = base if update.staleness else model  # a fresh update was trained from the current model
    update = Contribution(update.delta, update.examples, update.staleness, base)
    x, b, delta = (f.parameters.numpy().astype(np.float64) for f in (model, base, frame_of(update)))
    expected = oracle.fedasync(x, b, delta, alpha, make_staleness(function)(update.staleness), mixing)
    merged = merge({"strategy": "fedasync", "alpha": alpha, "mixing": mixing, "staleness": function}, model, [update])
    np.testing.assert_allclose(merged.parameters.numpy(), expected, rtol=1e-5, atol=2e-3)


@given(models, buffers, divisors, functions, st.randoms(use_true_random=False))
def test_order_within_a_buffer_matters_only_to_the_rounding(
    model: Frame, buffer: list[Contribution], divisor: dict[str, Any], function: StalenessConfig, random: Any
) -> None:
    shuffled = random.sample(buffer, len(buffer))
    first, second = (merge(fedbuff(staleness=function, **divisor), model, order) for order in (buffer, shuffled))
    np.testing.assert_allclose(first.parameters.numpy(), second.parameters.numpy(), rtol=1e-5, atol=2e-3)
    np.testing.assert_allclose(first.buffers[1].item(), second.buffers[1].item(), rtol=1e-4)
    assert first.counters.tolist() == second.counters.tolist()


@given(buffers, divisors, functions, st.integers(-10, 10))
def test_step_scales_with_the_deltas(
    buffer: list[Contribution], divisor: dict[str, Any], function: StalenessConfig, exponent: int
) -> None:
    """The factor is a power of two, so the rounding is the same, too."""
    aggregation, origin = fedbuff(staleness=function, **divisor), make_frame(0.0)
    scaled = []
    for c in buffer:
        frame = frame_of(c).copy()
        frame.parameters.mul_(2.0**exponent)
        scaled.append(Contribution(frame, c.examples, c.staleness))
    first, second = merge(aggregation, origin, buffer), merge(aggregation, origin, scaled)
    tiny = float(np.finfo(np.float32).tiny)  # below it floats lose digits, so scaling would round
    np.testing.assert_allclose(
        second.parameters.numpy(), first.parameters.numpy() * 2.0**exponent, rtol=1e-6, atol=tiny
    )


@given(models, buffers, functions, st.sampled_from(["count", "weights"]), st.integers(2, 1000))
def test_examples_count_only_relatively(
    model: Frame, buffer: list[Contribution], function: StalenessConfig, normalize: str, factor: int
) -> None:
    aggregation = fedbuff(staleness=function, normalize=normalize, weight_by_examples=True)
    more = [Contribution(c.delta, factor * c.examples, c.staleness) for c in buffer]
    first, second = merge(aggregation, model, buffer), merge(aggregation, model, more)
    np.testing.assert_allclose(first.parameters.numpy(), second.parameters.numpy(), rtol=1e-5, atol=2e-3)


@given(contributions, st.integers(1, 6), divisors, models)
def test_several_equal_updates_make_the_step_of_one(
    update: Contribution, count: int, divisor: dict[str, Any], model: Frame
) -> None:
    aggregation = fedbuff(**divisor)
    first, second = merge(aggregation, model, [update]), merge(aggregation, model, [update] * count)
    np.testing.assert_allclose(first.parameters.numpy(), second.parameters.numpy(), rtol=1e-5, atol=2e-3)


@given(buffers, divisors, functions)
def test_step_is_no_longer_than_the_longest_delta(
    buffer: list[Contribution], divisor: dict[str, Any], function: StalenessConfig
) -> None:
    step = merge(fedbuff(staleness=function, **divisor), make_frame(0.0), buffer).parameters.numpy()
    assert (np.abs(step) <= np.abs(deltas(buffer)).max(axis=0) * (1 + 1e-5) + 1e-30).all()


@given(buffers, functions, st.booleans())
def test_normalized_by_weights_the_step_lies_among_the_deltas(
    buffer: list[Contribution], function: StalenessConfig, by_examples: bool
) -> None:
    aggregation = fedbuff(staleness=function, normalize="weights", weight_by_examples=by_examples)
    step = merge(aggregation, make_frame(0.0), buffer).parameters.numpy()
    low, high = deltas(buffer).min(axis=0), deltas(buffer).max(axis=0)
    assert ((low - 1e-2 <= step) & (step <= high + 1e-2)).all()


@given(models, buffers, divisors, functions)
def test_variance_stays_among_the_variances_and_so_positive(
    model: Frame, buffer: list[Contribution], divisor: dict[str, Any], function: StalenessConfig
) -> None:
    merged = merge(fedbuff(staleness=function, **divisor), model, buffer).buffers[1].item()
    seen = [model.buffers[1].item(), *[c.delta.buffers[1].item() for c in buffer]]
    assert merged > 0
    assert min(seen) * (1 - 1e-5) <= merged <= max(seen) * (1 + 1e-5)


@given(models, contributions, alphas, functions)
def test_variance_stays_positive_under_fedasync(
    model: Frame, update: Contribution, alpha: float, function: StalenessConfig
) -> None:
    aggregation = {"strategy": "fedasync", "alpha": alpha, "mixing": "delta", "staleness": function}
    assert merge(aggregation, model, [update]).buffers[1] > 0


@given(models, buffers, divisors)
def test_counters_are_the_greatest_of_all(model: Frame, buffer: list[Contribution], divisor: dict[str, Any]) -> None:
    merged = merge(fedbuff(**divisor), model, buffer)
    assert merged.counters.item() == max([model.counters.item(), *[c.delta.counters.item() for c in buffer]])


@given(models, buffers, functions)
def test_fedbuff_by_examples_without_staleness_is_fedavg(
    model: Frame, buffer: list[Contribution], function: StalenessConfig
) -> None:
    fresh = [Contribution(c.delta, c.examples, 0) for c in buffer]
    assert same_bits(
        merge({"strategy": "fedavg"}, model, fresh),
        merge(fedbuff(staleness=function, weight_by_examples=True), model, fresh),
    )


@given(models, contributions)
def test_fedbuff_of_one_is_fedasync_bit_for_bit(model: Frame, update: Contribution) -> None:
    constant = {"function": "constant"}
    assert same_bits(
        merge(fedbuff(staleness=constant), model, [update]),
        merge({"strategy": "fedasync", "alpha": 1.0, "mixing": "delta", "staleness": constant}, model, [update]),
    )


@pytest.mark.parametrize("mode", ["fedasync", "fedbuff", "fedavg"])
@given(model=models, update=contributions)
def test_update_that_changes_nothing_changes_nothing(mode: str, model: Frame, update: Contribution) -> None:
    """The update has delta 0 and the model's own statistics."""
    frame = model.copy()
    frame.parameters.zero_()
    still = Contribution(frame, update.examples, update.staleness, model)
    merged = merge({"strategy": mode}, model, [still])
    np.testing.assert_allclose(merged.floats.numpy(), model.floats.numpy(), rtol=1e-6, atol=1e-4)
    assert merged.counters.tolist() == model.counters.tolist()
