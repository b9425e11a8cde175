"""Merging of buffers by their rules: what nobody changed keeps its bits, and each rule against values by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedqueue.config.aggregation import AggregationConfig, ServerOptimizerConfig
from fedqueue.tensors.frame import Frame
from fedqueue.tensors.manifest import Manifest
from fedqueue_coordinator.algorithms.aggregator import Contribution
from fedqueue_coordinator.algorithms.registry import make_aggregator
from fedqueue_coordinator.algorithms.server_optimizer import ServerOptimizer
from fedqueue_coordinator.core.admission import Inadmissible, admit_delta
from tests.support.builders import frame_of_module, make_config

EVERY_STRATEGY = {
    "fedasync model": {"strategy": "fedasync", "mixing": "model", "alpha": 0.7},
    "fedasync delta": {"strategy": "fedasync", "mixing": "delta", "alpha": 0.7},
    "fedbuff": {"strategy": "fedbuff", "buffer_size": 3},
    "fedbuff drift": {"strategy": "fedbuff", "buffer_size": 3, "running_statistics": "drift"},
    "fedbuff by weights": {"strategy": "fedbuff", "buffer_size": 3, "normalize": "weights"},
    "fedavg": {"strategy": "fedavg", "cohort_size": 3},
    "fadas": {"strategy": "fadas", "buffer_size": 3},
    "ca2fl": {"strategy": "ca2fl", "buffer_size": 3},
    "median": {"strategy": "fedbuff", "buffer_size": 3, "robust": {"rule": "median"}},
    "trimmed mean": {"strategy": "fedbuff", "buffer_size": 3, "robust": {"rule": "trimmed_mean", "byzantine": 1}},
    "geometric median": {"strategy": "fedbuff", "buffer_size": 3, "robust": {"rule": "geometric_median"}},
    "krum": {"strategy": "fedbuff", "buffer_size": 5, "robust": {"rule": "krum", "byzantine": 1}},
}


class Zoo(nn.Module):
    """Constants that a mean would change in the last bit, or make NaN, and buffers of every rule."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)
        self.norm = nn.BatchNorm1d(3)
        assert self.norm.running_mean is not None
        with torch.no_grad():
            self.norm.running_mean.copy_(torch.tensor([0.1, 1 / 3, 250000.0]))
        self.register_buffer("mask", torch.tensor([-torch.inf, torch.inf, torch.nan, torch.finfo(torch.float32).min]))
        self.register_buffer("stamp", torch.tensor([2.0**53 - 1, 1 / 3, -torch.inf], dtype=torch.float64))
        self.register_buffer("average", torch.tensor([0.1, -torch.inf, 0.7]))
        self.register_buffer("wide_average", torch.tensor([0.1, torch.inf], dtype=torch.float64))
        self.register_buffer("peak", torch.tensor([0.5, -torch.inf]))
        self.register_buffer("ptr", torch.tensor([3, -4]))
        self.register_buffer("seen_count", torch.tensor(5))


RULES = AggregationConfig(buffers={"*average": "mean", "peak": "max"})
NAMES = {"buffers": {"*average": "mean", "peak": "max"}}


def version() -> Frame:
    frame = Frame(Manifest.from_module(Zoo(), RULES))
    frame.read(Zoo())
    return frame


def update(model: Frame, change: Callable[..., Any] = lambda module: None) -> Frame:
    """The update of a client that trains on `model` and changes the module as `change` does."""
    module = Zoo()
    model.write(module)
    with torch.no_grad():
        change(module)
    made = Frame(model.manifest)
    made.read_update(module, model)
    return made


def merge(model: Frame, updates: list[Frame], staleness: int = 0, **aggregation: Any) -> Frame:
    """The next version, made as a coordinator makes it."""
    config = make_config(aggregation={**NAMES, "buffer_size": len(updates), **aggregation}, clients={"count": 5})
    aggregator = make_aggregator(config)
    accumulator = aggregator.init(model.manifest)
    base = model.copy()
    for i, delta in enumerate(updates):
        admit_delta(delta, model)
        aggregator.add(accumulator, Contribution(delta.copy(), 10, staleness, base, f"c{i}"), model)
    new = model.copy()
    ServerOptimizer(ServerOptimizerConfig(), new).step(aggregator.finish(accumulator, model))
    return new


def tail(frame: Frame) -> bytes:
    return frame.buffer[4 * frame.manifest.parameters :].tobytes()


@pytest.mark.parametrize("staleness", [0, 3])
@pytest.mark.parametrize("aggregation", EVERY_STRATEGY.values(), ids=EVERY_STRATEGY.keys())
def test_unchanged_buffers_keep_their_bits_in_every_strategy(aggregation: dict[str, Any], staleness: int) -> None:
    model = version()
    count = 1 if aggregation["strategy"] == "fedasync" else aggregation.get("buffer_size", 3)
    for _ in range(5):
        updates = [update(model, lambda module: module.layer.weight.add_(0.25)) for _ in range(count)]
        model = merge(model, updates, staleness, **aggregation)
    assert tail(model) == tail(version())
    assert model.parameters.isfinite().all()


def test_latest_takes_the_last_update_that_changed_the_tensor() -> None:
    def first(module: Any) -> None:
        module.stamp[1] = 7.0
        module.ptr[0] = 4

    def second(module: Any) -> None:
        module.stamp[1] = 9.0

    model = version()
    state = merge(model, [update(model, first), update(model, second), update(model)]).state_dict()
    assert state["stamp"].tolist() == [2.0**53 - 1, 9.0, -math.inf]
    assert state["ptr"].tolist() == [4, -4]


def test_latest_of_a_stale_client_does_not_undo_anothers_change() -> None:
    """The client trained from version 0, left the pointer alone, and arrives after one that moved it."""
    model = version()
    idle = update(model)
    moved = merge(model, [update(model, lambda module: module.ptr.add_(1))], strategy="fedasync", mixing="delta")
    after = merge(moved, [idle], 1, strategy="fedasync", mixing="delta")
    assert after.state_dict()["ptr"].tolist() == [4, -3]


def test_latest_may_fall_and_counters_may_not() -> None:
    def down(module: Any) -> None:
        module.ptr.fill_(-9)
        module.seen_count.fill_(1)

    model = version()
    state = merge(model, [update(model, down)]).state_dict()
    assert state["ptr"].tolist() == [-9, -9]
    assert state["seen_count"].item() == 5


def test_max_takes_the_largest_value_of_each_element() -> None:
    def change(value: Any) -> Callable[..., Any]:
        return lambda module: module.peak.__setitem__(0, value)

    model = version()
    state = merge(model, [update(model, change(v)) for v in (0.25, 2.0, 1.0)]).state_dict()
    assert state["peak"].tolist() == [2.0, -math.inf]
    assert merge(model, [update(model, change(0.25))]).state_dict()["peak"].tolist() == [0.5, -math.inf]


@pytest.mark.parametrize("name", ["average", "wide_average"])
def test_mean_is_the_weighted_mean_in_the_buffers_dtype(name: str) -> None:
    """The oracle is Σ s(τ) x_i / K + (1 − Σ s(τ) / K) x in float64."""
    values = [0.3, 1.7, 2.9]
    model = version()
    updates = [update(model, lambda m, v=v: getattr(m, name).__setitem__(0, v)) for v in values]
    state = merge(model, updates, staleness=3, strategy="fedbuff").state_dict()
    s = (1 + 3) ** -0.5
    expected = s * np.mean(values) + (1 - s) * 0.1
    tolerance = 1e-15 if name == "wide_average" else 1e-7
    assert float(state[name][0]) == pytest.approx(expected, rel=tolerance)
    assert math.isinf(float(state[name][1]))


def test_robust_rule_takes_a_tensor_that_most_updates_agree_on() -> None:
    """One of five replaces the buffer by a huge value; three move the pointer alike; two move another alone."""

    def honest(module: Any) -> None:
        module.ptr[0] = 8

    def hostile(module: Any) -> None:
        module.ptr[0] = 10**9
        module.stamp[1] = 1e200

    model = version()
    updates = [*(update(model, honest) for _ in range(3)), update(model), update(model, hostile)]
    state = merge(model, updates, strategy="fedbuff", robust={"rule": "median"}).state_dict()
    assert state["ptr"].tolist() == [8, -4]
    assert state["stamp"][1] == 1 / 3


# Admission


def change(name: str, index: int, value: float) -> Callable[..., Any]:
    def act(module: Any) -> None:
        getattr(module, name)[index] = value

    return act


@pytest.mark.parametrize(
    ("name", "index", "value"),
    [
        ("mask", 3, math.nan), ("mask", 0, math.inf), ("stamp", 0, math.inf), ("average", 0, -math.inf),
        ("average", 2, 3e38), ("wide_average", 0, math.nan), ("peak", 0, math.inf),
    ],
)  # fmt: skip
def test_buffer_that_has_become_infinite_is_named(name: str, index: int, value: float) -> None:
    model = version()
    with pytest.raises(Inadmissible, match=f"non_finite: the buffer {name} has become NaN, infinite or too large"):
        admit_delta(update(model, change(name, index, value)), model)


def test_changed_buffer_beside_an_infinite_element_is_admitted() -> None:
    model = version()
    admit_delta(update(model, change("mask", 3, -1.0)), model)


def test_first_bad_parameter_is_named() -> None:
    model = version()
    with pytest.raises(Inadmissible, match=r"non_finite: layer\.bias has NaN or infinity"):
        admit_delta(update(model, lambda module: module.layer.bias.fill_(math.nan)), model)
    with pytest.raises(Inadmissible, match="non_finite: the norm of the parameters overflows"):
        admit_delta(update(model, lambda module: module.layer.bias.fill_(3e38)), model)


# Infinite parameters


@pytest.mark.parametrize(
    "server",
    [
        {}, {"name": "adamw", "learning_rate": 0.1}, {"name": "sgd", "optimizer_options": {"momentum": 0.9}},
        {"name": "sgd", "learning_rate": 0.1, "optimizer_options": {"momentum": 0.9, "weight_decay": 0.1}},
    ],
)  # fmt: skip
@pytest.mark.parametrize("strategy", ["fedasync", "fedbuff"])
def test_infinite_parameter_stays_under_every_server_optimizer(server: dict[str, Any], strategy: str) -> None:
    module = nn.Linear(3, 1)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[-torch.inf, 1.0, torch.finfo(torch.float32).min]]))
    model = frame_of_module(module)
    optimizer = ServerOptimizer(ServerOptimizerConfig(**server), model)
    aggregator = make_aggregator(make_config(aggregation={"strategy": strategy, "buffer_size": 1, "mixing": "model"}))
    accumulator = aggregator.init(model.manifest)
    for _ in range(4):
        model.write(module)
        with torch.no_grad():
            module.weight[0, 1] += 1.0
        delta = Frame(model.manifest)
        delta.read_update(module, model)
        admit_delta(delta, model)
        aggregator.add(accumulator, Contribution(delta, 1, 2, model.copy()), model)
        optimizer.step(aggregator.finish(accumulator, model))
        accumulator.clear()
    assert model.parameters[0].item() == -math.inf
    assert model.parameters[1].item() > 1.0
    assert model.parameters.isnan().sum() == 0
