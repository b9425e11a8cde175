"""Robust merging against float64 centres, what hostile updates can do to it, and what a buffer of one kind becomes."""

from __future__ import annotations

import itertools

import numpy as np
import oracle
import pytest
import torch
from builders import make_config, make_frame, same_bits, start
from hypothesis import assume, given
from hypothesis import strategies as st

from fedqueue.config.aggregation import RobustConfig, ServerOptimizerConfig
from fedqueue.errors import ConfigurationError
from fedqueue.tensors.frame import PARAMETER, Frame, Manifest, TensorSpec
from fedqueue_coordinator.algorithms.aggregator import Contribution
from fedqueue_coordinator.algorithms.deterministic_reductions import BLOCK, inner_product, squared_distances
from fedqueue_coordinator.algorithms.registry import make_aggregator
from fedqueue_coordinator.algorithms.robust import RULES
from fedqueue_coordinator.algorithms.server_optimizer import ServerOptimizer

ROBUST = sorted(set(RULES) - {"mean"})
K, F = 7, 2

values = st.floats(-1000, 1000, width=32)
variances = st.floats(2.0**-10, 2.0**10, width=32)
updates = st.builds(make_frame, st.tuples(values, values), values, variances, st.integers(0, 1000))
buffers = st.lists(st.tuples(updates, st.integers(0, 20)), min_size=K, max_size=K)
models = st.builds(make_frame, st.tuples(values, values), values, variances, st.integers(0, 1000))


def aggregation(rule, staleness="constant", **robust):
    robust = {"rule": rule, "byzantine": F, **robust}
    return {"mode": "fedbuff", "buffer_size": K, "staleness": {"function": staleness}, "robust": robust}


def merge(settings, model, buffer):
    """The version after `model`; `buffer` holds (frame, staleness)."""
    aggregator = make_aggregator(make_config(aggregation=settings))
    after, accumulator = model.copy(), aggregator.init(model.manifest)
    for frame, tau in buffer:
        aggregator.add(accumulator, Contribution(frame, 10, tau), after)
    ServerOptimizer(ServerOptimizerConfig(), after).step(aggregator.finish(accumulator, after))
    return after


def rows_of(buffer, s):
    return np.array([s(tau) * frame.parameters.numpy().astype(np.float64) for frame, tau in buffer])


EXACT = {
    "median": lambda rows: np.median(rows, axis=0),
    "trimmed_mean": lambda rows: oracle.trimmed_mean(rows, F),
    "krum": lambda rows: oracle.krum(rows, F, 1),
    "multi_krum": lambda rows: oracle.krum(rows, F, K - F),
    "geometric_median": oracle.geometric_median,
    "norm_clipping": lambda rows: oracle.clipped_mean(rows, 0.0),
}


@pytest.mark.parametrize("function", ["constant", "polynomial"])
@pytest.mark.parametrize("rule", ROBUST)
def test_rule_agrees_with_its_definition(rule, function):
    rng = np.random.default_rng(3)
    for _ in range(10):
        buffer = [(make_frame(rng.normal(size=2).astype(np.float32)), tau) for tau in (0, 0, 1, 2, 0, 5, 9)]
        rows = rows_of(buffer, oracle.STALENESS[function])
        merged = merge(aggregation(rule, function), make_frame(0.0), buffer).parameters.numpy()
        if rule == "geometric_median":  # it is flat around the minimum: what is least is compared, not where
            assert oracle.total_distance(rows, merged) <= oracle.total_distance(rows, EXACT[rule](rows)) * (1 + 1e-5)
        else:
            np.testing.assert_allclose(merged, EXACT[rule](rows), rtol=1e-5, atol=1e-6)


def test_multi_krum_keeps_as_many_as_it_is_told_and_clipping_clips_to_what_it_is_told():
    rng = np.random.default_rng(4)
    buffer = [(make_frame(rng.normal(size=2).astype(np.float32)), 0) for _ in range(K)]
    rows = rows_of(buffer, oracle.STALENESS["constant"])
    for settings, expected in [
        (aggregation("multi_krum", keep=3), oracle.krum(rows, F, 3)),
        (aggregation("norm_clipping", clip_norm=0.5), oracle.clipped_mean(rows, 0.5)),
    ]:
        merged = merge(settings, make_frame(0.0), buffer)
        np.testing.assert_allclose(merged.parameters.numpy(), expected, rtol=1e-5, atol=1e-6)


@given(models, buffers)
def test_mean_that_trims_nothing_is_fedbuff(model, buffer):
    """The place of staleness, running statistics and divisor is the same in both."""
    plain = {"mode": "fedbuff", "buffer_size": K}
    trimmed = {**plain, "robust": {"rule": "trimmed_mean", "byzantine": 0}}
    first, second = merge(plain, model, buffer), merge(trimmed, model, buffer)
    np.testing.assert_allclose(first.floats.numpy(), second.floats.numpy(), rtol=1e-4, atol=2e-3)


@given(models, buffers)
def test_clipping_at_a_bound_that_nobody_reaches_is_fedbuff(model, buffer):
    plain = {"mode": "fedbuff", "buffer_size": K}
    clipped = {**plain, "robust": {"rule": "norm_clipping", "clip_norm": 1e9}}
    first, second = merge(plain, model, buffer), merge(clipped, model, buffer)
    np.testing.assert_allclose(first.floats.numpy(), second.floats.numpy(), rtol=1e-4, atol=2e-3)


@pytest.mark.parametrize("rule", ROBUST)
@given(models, updates)
def test_equal_updates_make_the_step_of_one(rule, model, update):
    merged = merge(aggregation(rule), model, [(update, 0)] * K)
    expected = model.parameters + update.parameters
    np.testing.assert_allclose(merged.parameters.numpy(), expected.numpy(), rtol=1e-5, atol=2e-3)
    np.testing.assert_allclose(merged.buffers.numpy(), update.buffers.numpy(), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("rule", ROBUST)
@given(buffers, st.randoms(use_true_random=False), st.integers(-8, 8))
def test_order_does_not_matter_and_the_step_scales_with_the_deltas(rule, buffer, random, exponent):
    """Where two updates are as good as each other, Krum takes the earlier: those buffers are left out."""
    rows = rows_of(buffer, oracle.STALENESS["constant"])
    distances = [float(np.linalg.norm(a - b)) for a, b in itertools.combinations(rows, 2)]
    assume(min(abs(a - b) for a, b in itertools.combinations(sorted(distances), 2)) > 1e-3 * max(distances))
    scaled = []
    for frame, tau in random.sample(buffer, K):
        other = frame.copy()
        other.parameters.mul_(2.0**exponent)
        scaled.append((other, tau))
    origin = make_frame(0.0)
    first, second = merge(aggregation(rule), origin, buffer), merge(aggregation(rule), origin, scaled)
    np.testing.assert_allclose(
        second.parameters.numpy(), first.parameters.numpy() * 2.0**exponent, rtol=1e-3, atol=1e-2 * 2.0**exponent
    )


@pytest.mark.parametrize("rule", sorted(set(ROBUST) - {"norm_clipping"}))
@given(st.lists(st.tuples(values, values), min_size=F, max_size=F))
def test_hostile_minority_cannot_take_the_step_out_of_where_the_honest_are(rule, hostile):
    """K = 7, f = 2: five updates near (1, 1), two anywhere. Geometric median: within its proven radius."""
    honest = [(make_frame([1.0 + 0.01 * i, 1.0 - 0.01 * i]), 0) for i in range(K - F)]
    buffer = [*honest, *[(make_frame(v), 0) for v in hostile]]
    merged = merge(aggregation(rule), make_frame(0.0), buffer).parameters
    assert (merged - 1.0).abs().max() < 0.3


@given(st.lists(st.tuples(values, values), min_size=F, max_size=F))
def test_clipped_hostile_updates_pull_no_further_than_their_share_of_the_usual_norm(hostile):
    honest = [(make_frame([1.0, 1.0]), 0) for _ in range(K - F)]
    merged = merge(aggregation("norm_clipping"), make_frame(0.0), [*honest, *[(make_frame(v), 0) for v in hostile]])
    assert torch.linalg.vector_norm(merged.parameters - (K - F) / K) <= F / K * 2**0.5 + 1e-5


def test_mean_is_taken_wherever_one_hostile_update_wants():
    """Otherwise the tests above would say nothing of the rules."""
    buffer = [(make_frame(1.0), 0)] * (K - 1) + [(make_frame(-1000.0), 0)]
    merged = merge({"mode": "fedbuff", "buffer_size": K}, make_frame(0.0), buffer)
    assert merged.parameters[0] < -100


@pytest.mark.parametrize("rule", ["median", "trimmed_mean", "krum", "multi_krum", "geometric_median"])
def test_hostile_running_statistics_and_counters_are_left_out_too(rule):
    honest = [(make_frame([1.0, 0.01 * i], mean=2.0, variance=3.0, steps=5), 0) for i in range(K - F)]
    hostile = [(make_frame([-50.0, 50.0], mean=1e6, variance=1e6, steps=2**40), 0)] * F
    merged = merge(aggregation(rule), make_frame(0.0), [*honest, *hostile])
    np.testing.assert_allclose(merged.buffers.numpy(), [2.0, 3.0], rtol=1e-2 if rule != "geometric_median" else 1e5)
    assert merged.counters.tolist() == [5]


@given(models, buffers, st.sampled_from(ROBUST))
def test_variance_stays_among_the_variances_and_so_positive(model, buffer, rule):
    merged = merge(aggregation(rule, "polynomial"), model, buffer).buffers[1].item()
    seen = [model.buffers[1].item(), *[frame.buffers[1].item() for frame, _ in buffer]]
    assert min(seen) * (1 - 1e-5) <= merged <= max(seen) * (1 + 1e-5)


@pytest.mark.parametrize("rule", ROBUST)
def test_buffer_that_closes_short_is_merged_all_the_same(rule):
    for count in range(1, K):
        merged = merge(aggregation(rule), make_frame(0.0), [(make_frame(2.0), 0)] * count)
        assert merged.parameters.tolist() == pytest.approx([2.0, 2.0], rel=1e-6)


def test_krum_takes_the_earlier_of_two_that_are_as_good():
    first, second, far = make_frame([0.0, 0.0]), make_frame([0.0, 1.0]), make_frame([9e3, 0.5])
    settings = {**aggregation("krum", byzantine=0), "buffer_size": 3}
    orders = ([first, second, far], [far, second, first])
    merged = [merge(settings, make_frame(0.0), [(frame, 0) for frame in order]) for order in orders]
    assert [m.parameters.tolist() for m in merged] == [[0.0, 0.0], [0.0, 1.0]]


@pytest.mark.parametrize("rule", ROBUST)
def test_updates_are_left_as_they_were(rule):
    buffer = [(make_frame([float(i), -1.0], mean=i, variance=1 + i, steps=i), i) for i in range(K)]
    before = [frame.copy() for frame, _ in buffer]
    merge(aggregation(rule, "polynomial"), make_frame(1.0), buffer)
    assert all(same_bits(a, b) for a, (b, _) in zip(before, buffer, strict=True))


def test_fadas_over_a_robust_centre_steps_by_its_sign():
    options = {"betas": (0.0, 0.0), "learning_rate": 1.0}
    settings = {**aggregation("median"), "mode": "fadas", "options": options}
    hostile = [(make_frame(-1000.0), 0)] * F
    merged = merge(settings, make_frame(0.0), [(make_frame(0.5), 0)] * (K - F) + hostile)
    assert merged.parameters.tolist() == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"mode": "fedasync"}, "needs mode 'fedbuff' or 'fadas', not 'fedasync'"),
        ({"mode": "fedavg"}, "needs mode 'fedbuff' or 'fadas', not 'fedavg'"),
        ({"weight_by_examples": True}, "weight_by_examples = false"),
        ({"normalize": "weights"}, "normalize = 'count'"),
        ({"buffer_size": 6}, "buffer_size must be at least 7, it is 6"),
        ({"robust": {"rule": "trimmed_mean", "byzantine": 4}}, "at least 9, it is 7"),
        ({"robust": {"rule": "multi_krum", "byzantine": 1, "keep": 8}}, "only 7 updates"),
        ({"robust": {"rule": "mode"}}, "'mean', 'median'"),
    ],
)
def test_rule_that_does_not_suit_the_buffer_is_refused(changed, says):
    with pytest.raises(ConfigurationError, match=says):
        make_config(aggregation={**aggregation("krum"), **changed})


def test_a_whole_run_merges_by_the_rule():
    clients = [f"client-{i}" for i in range(4)]
    run = start(*clients, aggregation={"mode": "fedbuff", "buffer_size": 3, "robust": {"rule": "median"}})
    for client, delta in zip(clients, (1.0, 500.0, 2.0), strict=False):
        run.post(client, delta)
    assert run.x == 2.0
    assert [line["weight"] for line in run.merged] == [1.0] * 3


# Memory and distances over vectors that are longer than a block


def long_frame(length, seed):
    manifest = Manifest((TensorSpec("w", "float32", (length,), 0, length, PARAMETER),))
    frame = Frame(manifest)
    frame.floats.copy_(torch.from_numpy(np.random.default_rng(seed).normal(size=length).astype(np.float32)))
    return frame


@pytest.mark.parametrize("rule", ROBUST)
def test_long_vectors_are_merged_block_by_block(rule):
    frames = [long_frame(2 * BLOCK + 7, seed) for seed in range(K)]
    expected = EXACT[rule](np.array([f.parameters.numpy().astype(np.float64) for f in frames]))
    merged = merge(aggregation(rule), long_frame(2 * BLOCK + 7, 99), [(f, 0) for f in frames])
    step = merged.parameters - long_frame(2 * BLOCK + 7, 99).parameters
    np.testing.assert_allclose(step.numpy(), expected, rtol=1e-3, atol=1e-5)


def test_distances_and_products_are_those_of_float64():
    a, b = (long_frame(BLOCK + 5, seed).parameters for seed in (1, 2))
    x, y = a.numpy().astype(np.float64), b.numpy().astype(np.float64)
    assert inner_product(a, b) == pytest.approx(x @ y, rel=1e-12)
    distances = squared_distances([a, b], [1.0, 0.5])
    assert distances[0, 1].item() == distances[1, 0].item() == pytest.approx(np.sum((x - y / 2) ** 2), rel=1e-12)
    assert distances.diagonal().tolist() == [0.0, 0.0]


def test_distances_have_the_same_bits_with_any_number_of_threads():
    vectors = [long_frame(5 * BLOCK, seed).parameters for seed in range(3)]
    threads, outcomes = torch.get_num_threads(), []
    try:
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            outcomes.append(squared_distances(vectors, [1.0, 0.3, 0.7]))
    finally:
        torch.set_num_threads(threads)
    assert all(o.equal(outcomes[0]) for o in outcomes)


def test_every_rule_of_the_configuration_is_there():
    assert set(RULES) == set(RobustConfig.model_fields["rule"].annotation.__args__)
