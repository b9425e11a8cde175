"""FedAsync, FedBuff and FedAvg compared with the oracle and with results by hand, without a federation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fedqueue.config.aggregation import STRATEGIES, ServerOptimizerConfig
from fedqueue.config.compression import DENSE, SPARSE, CompressionConfig
from fedqueue.tensors.codec import uplink_codec
from fedqueue.tensors.frame import Frame
from fedqueue.tensors.manifest import BUFFER, COUNTER, PARAMETER, Manifest, TensorSpec
from fedqueue_coordinator.algorithms.aggregator import Aggregator, Contribution
from fedqueue_coordinator.algorithms.registry import AGGREGATORS, make_aggregator
from fedqueue_coordinator.algorithms.server_optimizer import ServerOptimizer
from tests.support import oracle
from tests.support.builders import make_config, make_frame

FUNCTIONS = sorted(oracle.STALENESS)


def merge(aggregator: Aggregator, model: Frame, *contributions: Contribution) -> list[float]:
    """Make one version from `contributions`, with SGD at learning rate 1; return the weights of the contributions."""
    accumulator = aggregator.init(model.manifest)
    weights = [aggregator.add(accumulator, contribution, model) for contribution in contributions]
    ServerOptimizer(ServerOptimizerConfig(), model).step(aggregator.finish(accumulator, model))
    return weights


def fedasync(**options: Any) -> Aggregator:
    return make_aggregator(make_config(aggregation={"strategy": "fedasync", **options}))


def fedbuff(**options: Any) -> Aggregator:
    return make_aggregator(make_config(aggregation={"strategy": "fedbuff", **options}))


def fedavg(cohort: int = 2) -> Aggregator:
    return make_aggregator(make_config(aggregation={"strategy": "fedavg", "cohort_size": cohort}))


def numbers(seed: int, *shape: int) -> NDArray[Any]:
    """Return reproducible float32 values, as float64."""
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32).astype(np.float64)


# Against the oracle, over several versions


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("mixing", ["model", "delta"])
def test_fedasync_follows_the_formula(mixing: str, function: str) -> None:
    aggregator = fedasync(alpha=0.6, mixing=mixing, staleness={"function": function})
    model = make_frame(numbers(0, 2))
    x, history = model.parameters.numpy().astype(np.float64), [model.copy()]
    exact = [x]
    for version, tau in enumerate([0, 1, 0, 2, 4, 5, 3]):
        base, delta = version - tau, numbers(version + 1, 2)
        (weight,) = merge(aggregator, model, Contribution(make_frame(delta), 10, tau, history[base]))
        s = oracle.STALENESS[function](tau)
        x = oracle.fedasync(x, exact[base], delta, 0.6, s, mixing)
        history.append(model.copy())
        exact.append(x)
        assert weight == pytest.approx(0.6 * s)
        np.testing.assert_allclose(model.parameters.numpy(), x, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("by_examples", [False, True])
@pytest.mark.parametrize("normalize", ["count", "weights"])
def test_fedbuff_follows_the_formula(normalize: str, by_examples: bool, function: str) -> None:
    aggregator = fedbuff(
        buffer_size=3, normalize=normalize, weight_by_examples=by_examples, staleness={"function": function}
    )
    s = oracle.STALENESS[function]
    model = make_frame(numbers(0, 2))
    x = model.parameters.numpy().astype(np.float64)
    for version in range(4):
        updates = [
            oracle.Arrived(numbers(10 * version + i, 2), tau, n)
            for i, (tau, n) in enumerate([(0, 3), (version, 200), (2 * version, 41)])
        ]
        weights = merge(aggregator, model, *[Contribution(make_frame(u.delta), u.n, u.tau) for u in updates])
        x = x + oracle.fedbuff(updates, s, normalize, by_examples)
        assert weights == pytest.approx([s(u.tau) * (u.n if by_examples else 1) for u in updates])
        np.testing.assert_allclose(model.parameters.numpy(), x, rtol=1e-5, atol=1e-6)


def test_fedavg_is_the_example_weighted_mean_of_models() -> None:
    model = make_frame(numbers(0, 2))
    x = model.parameters.numpy().astype(np.float64)
    for version in range(4):
        locals_ = [x + numbers(10 * version + i, 2) for i in range(3)]
        examples = [1, 30, 7 + version]
        merge(
            fedavg(3),
            model,
            *[Contribution(make_frame(y - x), n, 0) for y, n in zip(locals_, examples, strict=True)],
        )
        x = oracle.fedavg(locals_, examples)
        np.testing.assert_allclose(model.parameters.numpy(), x, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("normalize", ["count", "weights"])
@pytest.mark.parametrize("by_examples", [False, True])
def test_running_statistics_follow_the_convex_mixture(normalize: str, by_examples: bool) -> None:
    aggregator = fedbuff(buffer_size=2, normalize=normalize, weight_by_examples=by_examples)
    model = make_frame(mean=3.0, variance=2.0)
    taus, examples, means, variances = [0, 3], [4, 12], [1.0, -7.0], [0.5, 9.0]
    merge(
        aggregator,
        model,
        *[
            Contribution(make_frame(mean=m, variance=v), n, tau)
            for tau, n, m, v in zip(taus, examples, means, variances, strict=True)
        ],
    )
    counts = examples if by_examples else [1, 1]
    weights = [oracle.STALENESS["polynomial"](tau) * n for tau, n in zip(taus, counts, strict=True)]
    divisor = sum(weights) if normalize == "weights" else sum(counts)
    expected = oracle.mix_buffers(
        np.array([3.0, 2.0]),
        [np.array(pair) for pair in zip(means, variances, strict=True)],
        [w / divisor for w in weights],
    )
    np.testing.assert_allclose(model.buffers.numpy(), expected, rtol=1e-6)


# By hand


def test_fedasync_mixes_the_clients_model_in() -> None:
    model = make_frame(4.0)
    merge(fedasync(alpha=0.25), model, Contribution(make_frame(8.0), 10, 0))
    assert model.parameters.tolist() == [6.0, 6.0]  # 3/4 · 4 + 1/4 · (4 + 8)


def test_fedasync_interpolates_towards_a_stale_clients_model() -> None:
    model = make_frame(4.0)
    stale = Contribution(make_frame(2.0), 10, 3, base=make_frame(0.0))
    merge(fedasync(alpha=1.0), model, stale)  # s(3) = 1/2
    assert model.parameters.tolist() == [3.0, 3.0]  # 1/2 · 4 + 1/2 · (0 + 2)


def test_fedasync_by_delta_ignores_the_base() -> None:
    model = make_frame(4.0)
    aggregator = fedasync(alpha=1.0, mixing="delta")
    merge(aggregator, model, Contribution(make_frame(2.0), 10, 3))
    assert model.parameters.tolist() == [5.0, 5.0]  # 4 + 1/2 · 2
    assert not aggregator.needs_base


@pytest.mark.parametrize(
    ("normalize", "by_examples", "expected"),
    [
        ("count", False, (8 + 4 / 2) / 2),
        ("weights", False, (8 + 4 / 2) / 1.5),
        ("count", True, (8 * 1 + 4 * 6 / 2) / 7),
        ("weights", True, (8 * 1 + 4 * 6 / 2) / 4),
    ],
)
def test_fedbuff_divisor_follows_normalize(normalize: str, by_examples: bool, expected: float) -> None:
    """One update has Δ = 8, staleness 0 and 1 example; the other has Δ = 4, staleness 3 (weight 1/2) and 6 examples."""
    model = make_frame(0.0)
    aggregator = fedbuff(buffer_size=2, normalize=normalize, weight_by_examples=by_examples)
    merge(aggregator, model, Contribution(make_frame(8.0), 1, 0), Contribution(make_frame(4.0), 6, 3))
    assert model.parameters[0].item() == pytest.approx(expected)


def test_fedavg_ignores_staleness_and_the_configured_weights() -> None:
    model = make_frame(0.0)
    merge(fedavg(), model, Contribution(make_frame(8.0), 1, 0), Contribution(make_frame(4.0), 3, 5))
    assert model.parameters.tolist() == [5.0, 5.0]


def test_accumulator_is_reset_after_each_version() -> None:
    aggregator, model = fedbuff(buffer_size=2), make_frame(0.0)
    accumulator, server = aggregator.init(model.manifest), ServerOptimizer(ServerOptimizerConfig(), model)
    for expected in (3.0, 6.0):
        for delta in (2.0, 4.0):
            aggregator.add(accumulator, Contribution(make_frame(delta), 10, 0), model)
        server.step(aggregator.finish(accumulator, model))
        accumulator.clear()
        assert model.parameters.tolist() == [expected, expected]


def test_merging_leaves_the_update_unchanged() -> None:
    update, base, model = make_frame([1.0, 2.0], 3.0, 4.0, 5), make_frame(1.0), make_frame(2.0)
    before = [frame.buffer.copy() for frame in (update, base)]
    merge(fedasync(), model, Contribution(update, 10, 1, base))
    assert all(np.array_equal(a, b.buffer) for a, b in zip(before, (update, base), strict=True))


# Buffers and counters


def test_fresh_buffers_become_the_mean_of_the_clients() -> None:
    model = make_frame(mean=50.0, variance=100.0)
    updates = [make_frame(mean=1.0, variance=2.0), make_frame(mean=3.0, variance=6.0)]
    merge(fedbuff(buffer_size=2), model, *[Contribution(update, 10, 0) for update in updates])
    assert model.buffers.tolist() == [2.0, 4.0]


def test_batchnorm_statistics_are_averaged_not_overwritten() -> None:
    """Known fault of other systems: the last client's running statistics replaced those of all others."""
    outcomes = []
    for variances in ((1.0, 3.0), (3.0, 1.0)):
        model = make_frame(variance=1.0)
        merge(fedbuff(buffer_size=2), model, *[Contribution(make_frame(variance=v), 10, 0) for v in variances])
        outcomes.append(model.buffers[1].item())
    assert outcomes == [2.0, 2.0]


def test_stale_statistics_are_mixed_with_the_current_value() -> None:
    model = make_frame(variance=8.0)
    merge(fedasync(alpha=0.5), model, Contribution(make_frame(variance=4.0), 10, 3, base=make_frame()))
    assert model.buffers[1].item() == 7.0  # 3/4 · 8 + 1/4 · 4


@pytest.mark.parametrize("mode", [{"buffer_size": 1}, {"buffer_size": 1, "normalize": "weights"}])
def test_near_zero_variance_does_not_round_below_zero(mode: dict[str, Any]) -> None:
    model = make_frame(variance=1.0)
    for large in (1e4, 123456.7, 3e30):
        model.buffers[1] = large
        merge(fedbuff(**mode, weight_by_examples=True), model, Contribution(make_frame(variance=1e-9), 7, 0))
        assert 0 < model.buffers[1].item() <= 1.1e-9


def test_counters_are_the_maximum_of_model_and_clients() -> None:
    for steps, expected in (((3, 9, 5), 9), ((1, 2, 1), 7)):
        model = make_frame(steps=7)
        merge(fedbuff(buffer_size=3), model, *[Contribution(make_frame(steps=n), 10, 0) for n in steps])
        assert model.counters.tolist() == [expected]


# Known faults of other systems


def test_buffer_sum_is_divided() -> None:
    model = make_frame(0.0)
    merge(fedbuff(buffer_size=4), model, *[Contribution(make_frame(8.0), 10, 0)] * 4)
    assert model.parameters.tolist() == [8.0, 8.0]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_staleness_weight_does_not_accumulate_in_alpha(function: str) -> None:
    """Known fault of other systems: after enough stale updates the mixing weight was almost 0."""
    aggregator = fedasync(alpha=0.6, mixing="delta", staleness={"function": function})
    model = make_frame(0.0)
    for _ in range(50):
        merge(aggregator, model, Contribution(make_frame(1.0), 10, 7))
    (weight,) = merge(aggregator, model, Contribution(make_frame(1.0), 10, 0))
    assert weight == 0.6


@pytest.mark.parametrize("function", FUNCTIONS)
def test_fresh_update_is_not_damped(function: str) -> None:
    """Known fault of other systems: 1 / (1 + τ + 1), or a sigmoid, gave a fresh update the weight 0.5."""
    aggregator = fedbuff(buffer_size=1, staleness={"function": function})
    model = make_frame(0.0)
    assert merge(aggregator, model, Contribution(make_frame(4.0), 10, 0)) == [1.0]
    assert model.parameters.tolist() == [4.0, 4.0]


@pytest.mark.parametrize("by_examples", [False, True])
def test_buffer_of_very_stale_updates_still_has_a_mean(by_examples: bool) -> None:
    """e^−1000 is 0 in float64, so without a minimum weight the mean would be 0 / 0."""
    staleness = {"function": "exponential", "a": 10.0}
    aggregator = fedbuff(buffer_size=2, normalize="weights", weight_by_examples=by_examples, staleness=staleness)
    model = make_frame(1.0)
    merge(aggregator, model, Contribution(make_frame(2.0), 5, 100), Contribution(make_frame(4.0), 5, 100))
    assert model.parameters.tolist() == [4.0, 4.0]
    assert model.buffers.tolist() == [0.0, 1.0]


def test_every_mode_of_the_configuration_has_an_aggregator() -> None:
    for mode in STRATEGIES:
        assert make_aggregator(make_config(aggregation={"strategy": mode})).name == mode
    assert set(AGGREGATORS) == set(STRATEGIES)


# Encoded updates

LONG = Manifest(
    (
        TensorSpec("w", "float32", (300_000,), 0, 300_000, PARAMETER),
        TensorSpec("v", "float32", (2,), 300_000, 2, BUFFER),
        TensorSpec("n", "int64", (), 0, 1, COUNTER),
    )
)


@pytest.mark.parametrize("name", [*DENSE, *SPARSE])
@pytest.mark.parametrize("aggregator", [fedasync(alpha=0.6, mixing="delta"), fedbuff(buffer_size=3), fedavg(3)])
def test_encoded_merge_equals_the_mean_of_decoded_updates(aggregator: Aggregator, name: str) -> None:
    """The 300,000 parameters span three pieces; the oracle sums whole vectors in float64."""
    assert aggregator.takes_pieces
    codec = uplink_codec(CompressionConfig(uplink=name, topk_ratio=0.1), LONG)
    model, deltas = Frame(LONG), []
    model.buffers.fill_(1.0)
    for i in range(aggregator.buffer_size):
        frame = Frame(LONG)
        frame.floats.copy_(frame.floats.new_tensor(numbers(i, 300_002)).abs_())
        frame.counters.fill_(i)
        deltas.append(codec.decode(codec.encode(frame, i)))
    merge(aggregator, model, *[Contribution(delta, 10, 0) for delta in deltas])
    scale = 0.6 if aggregator.name == "fedasync" else 1 / 3
    expected = scale * sum(delta.whole().parameters.double().numpy() for delta in deltas)
    buffers = scale * sum(delta.buffers.double().numpy() for delta in deltas) + (1 - scale * len(deltas))
    np.testing.assert_allclose(model.parameters.double().numpy(), expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(model.buffers.double().numpy(), buffers, rtol=1e-6)
    assert model.counters.tolist() == [aggregator.buffer_size - 1]
