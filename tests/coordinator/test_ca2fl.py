"""CA²FL compared with a float64 table of every client's last delta; the memory bound; the state after a crash."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedqueue.config.aggregation import ServerOptimizerConfig
from fedqueue.errors import ConfigurationError
from fedqueue.tensors.frame import Frame
from fedqueue_coordinator.algorithms.aggregator import Accumulator, Aggregator, Contribution
from fedqueue_coordinator.algorithms.registry import make_aggregator
from fedqueue_coordinator.algorithms.server_optimizer import ServerOptimizer
from fedqueue_coordinator.operator.audit.replay import replay
from tests.support import oracle
from tests.support.builders import make_config, make_frame, same_bits
from tests.support.federation_run import Died, start

CLIENTS = ("client-0", "client-1", "client-2", "client-3")
values = st.floats(-100, 100, width=32)
arrivals = st.lists(st.tuples(st.sampled_from(CLIENTS), st.tuples(values, values)), min_size=4, max_size=24)


def ca2fl(buffer_size: int, **options: Any) -> Aggregator:
    return make_aggregator(
        make_config(aggregation={"strategy": "ca2fl", "buffer_size": buffer_size, "strategy_options": options})
    )


def run(aggregator: Aggregator, model: Frame, arrived: list[tuple[Any, ...]], buffer_size: int) -> Accumulator:
    """Merge the arrivals in buffers; return the accumulator and the state in it."""
    accumulator, server = aggregator.init(model.manifest), ServerOptimizer(ServerOptimizerConfig(), model)
    for i in range(0, len(arrived) - len(arrived) % buffer_size, buffer_size):
        for client, delta in arrived[i : i + buffer_size]:
            aggregator.add(accumulator, Contribution(make_frame(delta), 10, i % 3, client=client), model)
        server.step(aggregator.finish(accumulator, model))
        accumulator.clear()
    return accumulator


@given(arrivals, st.integers(1, 4))
def test_ca2fl_follows_the_paper_over_any_arrivals(arrived: list[tuple[Any, ...]], buffer_size: int) -> None:
    model, exact = make_frame([1.0, -1.0]), oracle.CA2FL({client: np.zeros(2) for client in CLIENTS})
    x = np.array([1.0, -1.0])
    for i in range(0, len(arrived) - len(arrived) % buffer_size, buffer_size):
        x = exact.step(x, [(client, np.array(delta)) for client, delta in arrived[i : i + buffer_size]])
    accumulator = run(ca2fl(buffer_size), model, arrived, buffer_size)
    np.testing.assert_allclose(model.parameters.numpy(), x, rtol=1e-4, atol=1e-2)
    mean = accumulator.state.get("mean", np.zeros(2))
    np.testing.assert_allclose(mean, sum(exact.h.values()) / len(CLIENTS), rtol=1e-4, atol=1e-3)


def test_ca2fl_matches_two_steps_by_hand() -> None:
    """N = 4. After Δ = 8 from client-0: x = 8, h = 2. After Δ = 4 from client-1: x = 8 + 2 + 4, h = 3."""
    model = make_frame(0.0)
    accumulator = run(ca2fl(1), model, [("client-0", (8.0, 8.0)), ("client-1", (4.0, 4.0))], 1)
    assert model.parameters.tolist() == [14.0, 14.0]
    assert accumulator.state["mean"].tolist() == [3.0, 3.0]


def test_ca2fl_step_of_equal_deltas_is_that_delta() -> None:
    model = make_frame(0.0)
    arrived = [(client, (1.0, 1.0)) for client in CLIENTS]
    run(ca2fl(4), model, arrived, 4)
    assert model.parameters.tolist() == [1.0, 1.0]  # a first version with an update of every client is FedBuff's mean
    run_on = [*arrived, *arrived[:2]]
    model = make_frame(0.0)
    run(ca2fl(2), model, run_on, 2)
    assert model.parameters[0].item() == pytest.approx(1.0 + 1.5 + 1.0)  # 0 + 1, then 1/2 + 1, then 1 + 0


def test_first_version_is_that_of_fedbuff() -> None:
    arrived = [("client-0", (3.0, 1.0)), ("client-1", (1.0, -4.0))]
    model = make_frame([0.5, 0.25], mean=2.0, variance=3.0, steps=4)
    other = model.copy()
    run(ca2fl(2), model, arrived, 2)
    constant = {"function": "constant"}
    aggregation = {"strategy": "fedbuff", "buffer_size": 2, "staleness": constant}
    run(make_aggregator(make_config(aggregation=aggregation)), other, arrived, 2)
    assert same_bits(model, other)


@given(arrivals, st.integers(1, 3), st.integers(1, 4))
def test_ca2fl_cache_is_bounded_and_its_mean_is_exact(
    arrived: list[tuple[Any, ...]], buffer_size: int, bound: int
) -> None:
    state = run(ca2fl(buffer_size, cache_clients=bound), make_frame(), arrived, buffer_size).state
    cached = {name: value.numpy().astype(np.float64) for name, value in state.items() if name.startswith("cache/")}
    assert 0 < len(cached) <= bound
    assert len(state) == 1 + 2 * len(cached)
    np.testing.assert_allclose(state["mean"], sum(cached.values()) / len(CLIENTS), rtol=1e-3, atol=1e-3)


def test_cache_evicts_the_least_recent_contributor() -> None:
    order = [0, 1, 0, 2]
    arrived = [(CLIENTS[i], (1.0, 1.0)) for i in order]
    state = run(ca2fl(1, cache_clients=2), make_frame(), arrived, 1).state
    assert {name for name in state if name.startswith("cache/")} == {"cache/client-0", "cache/client-2"}


def test_adding_an_update_does_not_change_the_state() -> None:
    """Only `finish` may change the state, because an update without a commit is added again after a crash."""
    aggregator, model = ca2fl(2), make_frame()
    accumulator = run(aggregator, model, [("client-0", (1.0, 2.0)), ("client-1", (3.0, 4.0))], 2)
    before = {name: value.clone() for name, value in accumulator.state.items()}
    aggregator.add(accumulator, Contribution(make_frame(9.0), 10, 0, client="client-0"), model)
    assert accumulator.state.keys() == before.keys()
    assert all(value.equal(before[name]) for name, value in accumulator.state.items())


@pytest.mark.parametrize("dies_before", range(1, 12))
def test_cache_survives_a_coordinator_crash_at_any_step(dies_before: int) -> None:
    aggregation = {"strategy": "ca2fl", "buffer_size": 2}
    posts = [("client-0", 1.0), ("client-1", 2.0), ("client-0", 4.0), ("client-2", 8.0), ("client-1", 16.0),
             ("client-0", 32.0)]  # fmt: skip
    whole, broken = (start(*CLIENTS, aggregation=aggregation) for _ in range(2))
    broken.dies_before = dies_before
    for client, delta in posts:
        whole.post(client, delta)
        try:
            broken.post(client, delta)
        except Died:
            broken.restart()
    assert whole.federation.version == broken.federation.version == 3
    assert same_bits(whole.federation.model, broken.federation.model)
    assert whole.federation.optimizer_state == broken.federation.optimizer_state


def test_ca2fl_replay_has_the_bits_of_the_run() -> None:
    run = start(*CLIENTS, aggregation={"strategy": "ca2fl", "buffer_size": 2})
    for client, delta in [("client-0", 1.0), ("client-1", 2.0), ("client-0", 4.0), ("client-2", 8.0)]:
        run.post(client, delta)

    def read(job: Any, attempt: Any) -> Any:
        return run.payloads[job].buffer

    assert replay(run.config, run.ledger, run.versions[0].copy(), read, run.federation.model).problems == []
    run.ledger[-1]["merged"][0]["client"] = "client-3"
    (problem,) = replay(run.config, run.ledger, run.versions[0].copy(), read, run.federation.model).problems
    assert "the model differs" in problem


@pytest.mark.parametrize("bound", [-1, 1.5, "all"])
def test_invalid_cache_bound_is_refused(bound: float | str) -> None:
    with pytest.raises(ConfigurationError, match="cache_clients must be an integer of at least 1"):
        ca2fl(1, cache_clients=bound)
