"""Robust rules compared with float64 centers, their bounds on hostile updates, and buffers of equal updates."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedqueue.config.aggregation import RobustConfig, ServerOptimizerConfig
from fedqueue.errors import ConfigurationError
from fedqueue.tensors.frame import Frame
from fedqueue.tensors.manifest import PARAMETER, Manifest, TensorSpec
from fedqueue_coordinator.algorithms.aggregator import Contribution
from fedqueue_coordinator.algorithms.deterministic_reductions import BLOCK, inner_product, squared_distances
from fedqueue_coordinator.algorithms.registry import make_aggregator
from fedqueue_coordinator.algorithms.robust import RULES
from fedqueue_coordinator.algorithms.server_optimizer import ServerOptimizer
from tests.support import oracle
from tests.support.builders import make_config, make_frame, same_bits
from tests.support.federation_run import start

ROBUST = sorted(set(RULES) - {"mean"})
K, F = 7, 2

values = st.floats(-1000, 1000, width=32)
variances = st.floats(2.0**-10, 2.0**10, width=32)
updates = st.builds(make_frame, st.tuples(values, values), values, variances, st.integers(0, 1000))
buffers = st.lists(st.tuples(updates, st.integers(0, 20)), min_size=K, max_size=K)
models = st.builds(make_frame, st.tuples(values, values), values, variances, st.integers(0, 1000))


def aggregation(rule: str, staleness: str = "constant", **robust: Any) -> dict[str, Any]:
    robust = {"rule": rule, "byzantine": F, **robust}
    return {"strategy": "fedbuff", "buffer_size": K, "staleness": {"function": staleness}, "robust": robust}


def merge(settings: dict[str, Any], model: Frame, buffer: list[tuple[Any, ...]]) -> Frame:
    """Return the version after `model`; `buffer` has pairs (frame, staleness)."""
    aggregator = make_aggregator(make_config(aggregation=settings))
    after, accumulator = model.copy(), aggregator.init(model.manifest)
    for frame, tau in buffer:
        aggregator.add(accumulator, Contribution(frame, 10, tau), after)
    ServerOptimizer(ServerOptimizerConfig(), after).step(aggregator.finish(accumulator, after))
    return after


def rows_of(buffer: list[tuple[Any, ...]], s: Callable[..., Any]) -> NDArray[Any]:
    return np.array([s(tau) * frame.parameters.numpy().astype(np.float64) for frame, tau in buffer])


EXACT: dict[str, Callable[[oracle.Array], oracle.Array]] = {
    "median": lambda rows: np.median(rows, axis=0),
    "trimmed_mean": lambda rows: oracle.trimmed_mean(rows, F),
    "krum": lambda rows: oracle.krum(rows, F, 1),
    "multi_krum": lambda rows: oracle.krum(rows, F, K - F),
    "geometric_median": oracle.geometric_median,
    "norm_clipping": lambda rows: oracle.clipped_mean(rows, 0.0),
}


@pytest.mark.parametrize("function", ["constant", "polynomial"])
@pytest.mark.parametrize("rule", ROBUST)
def test_rule_agrees_with_its_definition(rule: str, function: str) -> None:
    rng = np.random.default_rng(3)
    for _ in range(10):
        buffer = [(make_frame(rng.normal(size=2).astype(np.float32)), tau) for tau in (0, 0, 1, 2, 0, 5, 9)]
        rows = rows_of(buffer, oracle.STALENESS[function])
        merged = merge(aggregation(rule, function), make_frame(0.0), buffer).parameters.numpy()
        if rule == "geometric_median":  # flat around the minimum, so compare the objective and not the position
            assert oracle.total_distance(rows, merged) <= oracle.total_distance(rows, EXACT[rule](rows)) * (1 + 1e-5)
        else:
            np.testing.assert_allclose(merged, EXACT[rule](rows), rtol=1e-5, atol=1e-6)


def test_multi_krum_and_clipping_follow_their_options() -> None:
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
def test_trimmed_mean_without_trimming_equals_fedbuff(model: Frame, buffer: list[tuple[Any, ...]]) -> None:
    """Both strategies treat staleness, running statistics and the divisor in the same way."""
    plain = {"strategy": "fedbuff", "buffer_size": K}
    trimmed = {**plain, "robust": {"rule": "trimmed_mean", "byzantine": 0}}
    first, second = merge(plain, model, buffer), merge(trimmed, model, buffer)
    np.testing.assert_allclose(first.floats.numpy(), second.floats.numpy(), rtol=1e-4, atol=2e-3)


@given(models, buffers)
def test_clipping_above_all_norms_equals_fedbuff(model: Frame, buffer: list[tuple[Any, ...]]) -> None:
    plain = {"strategy": "fedbuff", "buffer_size": K}
    clipped = {**plain, "robust": {"rule": "norm_clipping", "clip_norm": 1e9}}
    first, second = merge(plain, model, buffer), merge(clipped, model, buffer)
    np.testing.assert_allclose(first.floats.numpy(), second.floats.numpy(), rtol=1e-4, atol=2e-3)


@pytest.mark.parametrize("rule", ROBUST)
@given(models, updates)
def test_equal_updates_give_the_step_of_one_update(rule: str, model: Frame, update: Frame) -> None:
    merged = merge(aggregation(rule), model, [(update, 0)] * K)
    expected = model.parameters + update.parameters
    np.testing.assert_allclose(merged.parameters.numpy(), expected.numpy(), rtol=1e-5, atol=2e-3)
    np.testing.assert_allclose(merged.buffers.numpy(), update.buffers.numpy(), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("rule", ROBUST)
@given(buffers, st.randoms(use_true_random=False), st.integers(-8, 8))
def test_robust_step_ignores_order_and_scales_with_deltas(
    rule: str, buffer: list[tuple[Any, ...]], random: Any, exponent: int
) -> None:
    """Krum breaks ties in favor of the earlier update, so buffers with ties are skipped."""
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
def test_byzantine_minority_cannot_move_the_step_outside(rule: str, hostile: list[tuple[Any, ...]]) -> None:
    """K = 7, f = 2: five updates are near (1, 1), two anywhere. The geometric median stays in its proven radius."""
    honest = [(make_frame([1.0 + 0.01 * i, 1.0 - 0.01 * i]), 0) for i in range(K - F)]
    buffer = [*honest, *[(make_frame(v), 0) for v in hostile]]
    merged = merge(aggregation(rule), make_frame(0.0), buffer).parameters
    assert (merged - 1.0).abs().max() < 0.3


@given(st.lists(st.tuples(values, values), min_size=F, max_size=F))
def test_clipped_byzantine_updates_have_bounded_influence(hostile: list[tuple[Any, ...]]) -> None:
    honest = [(make_frame([1.0, 1.0]), 0) for _ in range(K - F)]
    merged = merge(aggregation("norm_clipping"), make_frame(0.0), [*honest, *[(make_frame(v), 0) for v in hostile]])
    assert torch.linalg.vector_norm(merged.parameters - (K - F) / K) <= F / K * 2**0.5 + 1e-5


def test_one_hostile_update_moves_the_plain_mean() -> None:
    """The mean must fail here, or else the tests above would not show that the rules help."""
    buffer = [(make_frame(1.0), 0)] * (K - 1) + [(make_frame(-1000.0), 0)]
    merged = merge({"strategy": "fedbuff", "buffer_size": K}, make_frame(0.0), buffer)
    assert merged.parameters[0] < -100


@pytest.mark.parametrize("rule", ["median", "trimmed_mean", "krum", "multi_krum", "geometric_median"])
def test_byzantine_statistics_and_counters_are_left_out(rule: str) -> None:
    honest = [(make_frame([1.0, 0.01 * i], mean=2.0, variance=3.0, steps=5), 0) for i in range(K - F)]
    hostile = [(make_frame([-50.0, 50.0], mean=1e6, variance=1e6, steps=2**40), 0)] * F
    merged = merge(aggregation(rule), make_frame(0.0), [*honest, *hostile])
    np.testing.assert_allclose(merged.buffers.numpy(), [2.0, 3.0], rtol=1e-2 if rule != "geometric_median" else 1e5)
    assert merged.counters.tolist() == [5]


@given(models, buffers, st.sampled_from(ROBUST))
def test_merged_variance_stays_within_the_range_of_variances(
    model: Frame, buffer: list[tuple[Any, ...]], rule: str
) -> None:
    merged = merge(aggregation(rule, "polynomial"), model, buffer).buffers[1].item()
    seen = [model.buffers[1].item(), *[frame.buffers[1].item() for frame, _ in buffer]]
    assert min(seen) * (1 - 1e-5) <= merged <= max(seen) * (1 + 1e-5)


@pytest.mark.parametrize("rule", ROBUST)
def test_short_buffer_is_merged_by_the_rule(rule: str) -> None:
    for count in range(1, K):
        merged = merge(aggregation(rule), make_frame(0.0), [(make_frame(2.0), 0)] * count)
        assert merged.parameters.tolist() == pytest.approx([2.0, 2.0], rel=1e-6)


def test_krum_breaks_ties_in_favor_of_the_earlier_update() -> None:
    first, second, far = make_frame([0.0, 0.0]), make_frame([0.0, 1.0]), make_frame([9e3, 0.5])
    settings = {**aggregation("krum", byzantine=0), "buffer_size": 3}
    orders = ([first, second, far], [far, second, first])
    merged = [merge(settings, make_frame(0.0), [(frame, 0) for frame in order]) for order in orders]
    assert [m.parameters.tolist() for m in merged] == [[0.0, 0.0], [0.0, 1.0]]


@pytest.mark.parametrize("rule", ROBUST)
def test_robust_merge_leaves_updates_unchanged(rule: str) -> None:
    buffer = [(make_frame([float(i), -1.0], mean=i, variance=1 + i, steps=i), i) for i in range(K)]
    before = [frame.copy() for frame, _ in buffer]
    merge(aggregation(rule, "polynomial"), make_frame(1.0), buffer)
    assert all(same_bits(a, b) for a, (b, _) in zip(before, buffer, strict=True))


def test_fadas_with_a_robust_rule_steps_by_the_sign() -> None:
    options = {"betas": (0.0, 0.0), "learning_rate": 1.0}
    settings = {**aggregation("median"), "strategy": "fadas", "strategy_options": options}
    hostile = [(make_frame(-1000.0), 0)] * F
    merged = merge(settings, make_frame(0.0), [(make_frame(0.5), 0)] * (K - F) + hostile)
    assert merged.parameters.tolist() == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"strategy": "fedasync"}, "strategy 'fedasync' does not have; set strategy to 'fedbuff' or 'fadas'"),
        ({"strategy": "fedavg"}, "strategy 'fedavg' does not have; set strategy to 'fedbuff' or 'fadas'"),
        ({"weight_by_examples": True}, "weight_by_examples = false"),
        ({"normalize": "weights"}, "normalize = 'count'"),
        ({"buffer_size": 6}, "buffer_size is 6; set buffer_size to at least 7"),
        ({"robust": {"rule": "trimmed_mean", "byzantine": 4}}, "buffer_size is 7; set buffer_size to at least 9"),
        ({"robust": {"rule": "multi_krum", "byzantine": 1, "keep": 8}}, "only 7 updates"),
        ({"robust": {"rule": "mode"}}, "'mean', 'median'"),
    ],
)
def test_rule_unsuitable_for_the_buffer_size_is_refused(changed: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        make_config(aggregation={**aggregation("krum"), **changed})


def test_whole_run_merges_by_the_rule() -> None:
    clients = [f"client-{i}" for i in range(4)]
    run = start(*clients, aggregation={"strategy": "fedbuff", "buffer_size": 3, "robust": {"rule": "median"}})
    for client, delta in zip(clients, (1.0, 500.0, 2.0), strict=False):
        run.post(client, delta)
    assert run.x == 2.0
    assert [line["weight"] for line in run.merged] == [1.0] * 3


# Memory and distances over vectors that are longer than a block


def long_frame(length: int, seed: int) -> Frame:
    manifest = Manifest((TensorSpec("w", "float32", (length,), 0, length, PARAMETER),))
    frame = Frame(manifest)
    frame.floats.copy_(torch.from_numpy(np.random.default_rng(seed).normal(size=length).astype(np.float32)))
    return frame


@pytest.mark.parametrize("rule", ROBUST)
def test_vectors_of_several_blocks_match_the_exact_rule(rule: str) -> None:
    frames = [long_frame(2 * BLOCK + 7, seed) for seed in range(K)]
    expected = EXACT[rule](np.array([f.parameters.numpy().astype(np.float64) for f in frames]))
    merged = merge(aggregation(rule), long_frame(2 * BLOCK + 7, 99), [(f, 0) for f in frames])
    step = merged.parameters - long_frame(2 * BLOCK + 7, 99).parameters
    np.testing.assert_allclose(step.numpy(), expected, rtol=1e-3, atol=1e-5)


def test_distances_and_products_match_float64() -> None:
    a, b = (long_frame(BLOCK + 5, seed).parameters for seed in (1, 2))
    x, y = a.numpy().astype(np.float64), b.numpy().astype(np.float64)
    assert inner_product(a, b) == pytest.approx(x @ y, rel=1e-12)
    distances = squared_distances([a, b], [1.0, 0.5])
    assert distances[0, 1].item() == distances[1, 0].item() == pytest.approx(np.sum((x - y / 2) ** 2), rel=1e-12)
    assert distances.diagonal().tolist() == [0.0, 0.0]


def test_distances_have_the_same_bits_for_any_thread_count() -> None:
    vectors = [long_frame(5 * BLOCK, seed).parameters for seed in range(3)]
    threads, outcomes = torch.get_num_threads(), []
    try:
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            outcomes.append(squared_distances(vectors, [1.0, 0.3, 0.7]))
    finally:
        torch.set_num_threads(threads)
    assert all(o.equal(outcomes[0]) for o in outcomes)


def test_every_configurable_rule_is_implemented() -> None:
    assert set(RULES) == set(get_args(RobustConfig.model_fields["rule"].annotation))
