"""The server optimizer: each update rule in float64, and saving and restoring its state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedqueue.config.aggregation import ServerOptimizerConfig
from fedqueue.errors import ConfigurationError, StoreError
from fedqueue.tensors.frame import Frame
from fedqueue.tensors.manifest import PARAMETER, Manifest, TensorSpec
from fedqueue_coordinator.algorithms.aggregator import Step
from fedqueue_coordinator.algorithms.server_optimizer import ServerOptimizer
from fedqueue_coordinator.core.server_state import save_state
from tests.support import oracle
from tests.support.builders import make_frame, same_bits

START = [0.5, -2.0]
DELTAS = [[1.0, -0.5], [0.25, 2.0], [-3.0, 0.125], [0.0, 1.0], [1e-3, -40.0]]

RULES: dict[str, tuple[dict[str, Any], Callable[[], Any]]] = {
    "sgd": ({"learning_rate": 1.0}, oracle.SGD),
    "sgd at another rate": ({"learning_rate": 0.3}, lambda: oracle.SGD(lr=0.3)),
    "sgd with momentum": (
        {"learning_rate": 0.5, "optimizer_options": {"momentum": 0.9}},
        lambda: oracle.SGD(lr=0.5, momentum=0.9),
    ),
    "adam": ({"name": "adam", "learning_rate": 0.1}, lambda: oracle.Adam(lr=0.1)),
    "adam with options": (
        {"name": "Adam", "learning_rate": 0.05, "optimizer_options": {"betas": (0.8, 0.99), "eps": 1e-3}},
        lambda: oracle.Adam(lr=0.05, betas=(0.8, 0.99), eps=1e-3),
    ),
    "adamw": (
        {"name": "adamw", "learning_rate": 0.1, "optimizer_options": {"weight_decay": 0.2}},
        lambda: oracle.Adam(lr=0.1, decay=0.2),
    ),
    "adagrad": ({"name": "adagrad", "learning_rate": 0.2}, lambda: oracle.Adagrad(lr=0.2)),
}
STATEFUL = ["sgd with momentum", "adam", "adam with options", "adamw", "adagrad"]


def step_of(delta: list[float], buffers: tuple[Any, ...] = (0.0, 1.0), counter: int = 0) -> Step:
    return Step(torch.tensor(delta), torch.tensor(buffers), torch.tensor([counter]))


def optimizer(name: str, model: Frame) -> ServerOptimizer:
    return ServerOptimizer(ServerOptimizerConfig(**RULES[name][0]), model)


@pytest.mark.parametrize("name", RULES)
def test_each_optimizer_follows_its_update_rule(name: str) -> None:
    model, rule = make_frame(START), RULES[name][1]()
    server = optimizer(name, model)
    x = np.array(START)
    for delta in DELTAS:
        server.step(step_of(delta))
        x = rule.step(x, np.array(delta))
        np.testing.assert_allclose(model.parameters.numpy(), x, rtol=1e-5, atol=1e-6)


@given(
    st.lists(st.tuples(*[st.floats(-1e6, 1e6, width=32)] * 3), min_size=1, max_size=20),
    st.floats(1e-3, 2.0),
)
def test_plain_step_has_the_bits_of_torch_sgd(rows: list[tuple[Any, ...]], rate: float) -> None:
    start, deltas = torch.tensor([row[0] for row in rows]), [torch.tensor([row[i] for row in rows]) for i in (1, 2)]
    parameter = torch.nn.Parameter(start.clone())
    sgd = torch.optim.SGD([parameter], lr=rate)
    length = len(rows)
    model = Frame(Manifest((TensorSpec("w", "float32", (length,), 0, length, PARAMETER),)))
    model.parameters.copy_(start)
    server = ServerOptimizer(ServerOptimizerConfig(learning_rate=rate), model)
    for delta in deltas:
        parameter.grad = -delta
        sgd.step()
        server.step(Step(delta, model.buffers, model.counters))
    assert model.parameters.numpy().tobytes() == parameter.detach().numpy().tobytes()


def test_sgd_at_rate_one_is_plain_addition() -> None:
    model = make_frame([1.0, 2.0])
    optimizer("sgd", model).step(step_of([0.5, -0.25]))
    assert model.parameters.tolist() == [1.5, 1.75]


def test_momentum_matches_steps_by_hand() -> None:
    model = make_frame(0.0)
    server = optimizer("sgd with momentum", model)  # v ← 0.9 v + Δ, x ← x + 0.5 v
    for expected in (0.5, 0.5 + 0.95):
        server.step(step_of([1.0, 1.0]))
        assert model.parameters[0].item() == pytest.approx(expected)


def test_first_adam_step_has_the_size_of_the_learning_rate() -> None:
    model = make_frame(0.0)
    optimizer("adam", model).step(step_of([1000.0, -0.01]))
    assert model.parameters.tolist() == pytest.approx([0.1, -0.1], rel=1e-5)


@pytest.mark.parametrize("name", RULES)
def test_buffers_and_counters_are_set_and_not_optimized(name: str) -> None:
    model = make_frame(START)
    optimizer(name, model).step(step_of(DELTAS[0], buffers=(7.0, 0.125), counter=5))
    assert model.buffers.tolist() == [7.0, 0.125]
    assert model.counters.tolist() == [5]


@pytest.mark.parametrize("name", RULES)
def test_restored_optimizer_continues_with_the_same_bits(name: str) -> None:
    model = make_frame(START)
    server = optimizer(name, model)
    for delta in DELTAS[:3]:
        server.step(step_of(delta))
    other = model.copy()
    successor = optimizer(name, other)
    successor.restore({name: value.clone() for name, value in server.state.items()})
    for delta in DELTAS[3:]:
        server.step(step_of(delta))
        successor.step(step_of(delta))
    assert same_bits(model, other)
    assert save_state({"optimizer": server.state}) == save_state({"optimizer": successor.state})


@pytest.mark.parametrize("name", STATEFUL)
def test_losing_the_optimizer_state_changes_the_result(name: str) -> None:
    """Without the state the result differs, which shows that the test above can fail."""
    model = make_frame(START)
    server = optimizer(name, model)
    for delta in DELTAS[:3]:
        server.step(step_of(delta))
    other = model.copy()
    optimizer(name, other).step(step_of(DELTAS[3]))
    server.step(step_of(DELTAS[3]))
    assert not same_bits(model, other)


def test_optimizer_without_state_has_none_and_restores_it() -> None:
    model = make_frame(START)
    server = optimizer("sgd", model)
    server.step(step_of(DELTAS[0]))
    assert server.state == {}
    server.restore({})


def test_state_of_another_model_is_refused() -> None:
    state = {"step": torch.tensor(1.0), "exp_avg": torch.zeros(3), "exp_avg_sq": torch.zeros(3)}
    with pytest.raises(StoreError, match="does not fit"):
        optimizer("adam", make_frame()).restore(state)


def test_unknown_optimizer_error_lists_the_known_ones() -> None:
    with pytest.raises(ConfigurationError, match=r"server_optimizer\.name = 'adm'.*adagrad, adam"):
        ServerOptimizer(ServerOptimizerConfig(name="adm"), make_frame())


def test_unknown_option_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"server_optimizer\.optimizer_options"):
        ServerOptimizer(ServerOptimizerConfig(name="sgd", optimizer_options={"beta": 1.0}), make_frame())


@pytest.mark.parametrize("name", ["lbfgs", "sparseadam"])
def test_sparse_only_optimizer_is_refused_at_once(name: str) -> None:
    with pytest.raises(ConfigurationError, match=r"server_optimizer\.name"):
        ServerOptimizer(ServerOptimizerConfig(name=name), make_frame())
