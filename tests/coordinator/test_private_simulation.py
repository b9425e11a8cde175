"""Simulations whose rows are protected: repeatable, with the budget of each client, and refused where it cannot be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from fedqueue import Client, Task
from fedqueue.config.loading import parse_config
from fedqueue.errors import ConfigurationError, TaskError
from fedqueue_coordinator.core.run_summary import RunResult
from fedqueue_coordinator.simulation.virtual_clock import ClientDatasets, Simulation, TimingModel
from tests.support.builders import same_bits
from tests.support.toy_task import points

NOISE = {"max_grad_norm": 1.0, "delta": 1e-5, "noise_multiplier": 0.7}
BUDGET = {"max_grad_norm": 1.0, "delta": 1e-5, "epsilon": 3.0, "jobs": 4}


class PointsTask(Task):
    def __init__(self, batch_norm: bool = False) -> None:
        self.batch_norm = batch_norm

    def model(self) -> torch.nn.Module:
        norm = torch.nn.BatchNorm1d(8) if self.batch_norm else torch.nn.GroupNorm(2, 8)
        return torch.nn.Sequential(torch.nn.Linear(4, 8), norm, torch.nn.ReLU(), torch.nn.Linear(8, 2))

    def train_data(self, client: Client) -> Any:
        return points(60 if client.id == "client-0" else 90, seed=1 + (client.partition or 0))

    def test_data(self) -> TensorDataset:
        return points(200, seed=0)


def simulate(task: Task, examples: dict[str, Any], seed: int = 0, updates: int = 12, **sections: Any) -> RunResult:
    tree = {
        "task": {"entrypoint": "task.py:PointsTask"}, "clients": {"count": 3}, "seed": seed,
        "training": {"device": "cpu", "batch_size": 15, "learning_rate": 0.5}, "aggregation": {"buffer_size": 2},
        "privacy": {"examples": examples}, "stop": {"updates": updates}, **sections,
    }  # fmt: skip
    return Simulation(parse_config(tree), ClientDatasets(task), TimingModel()).run()


def test_simulation_with_noise_can_be_repeated() -> None:
    first, second, other = (simulate(PointsTask(), NOISE, seed) for seed in (0, 0, 1))
    assert same_bits(first.model, second.model)
    assert not same_bits(first.model, other.model)
    assert not same_bits(first.model, simulate(PointsTask(), {}).model)


def test_ledger_of_a_private_run_has_no_metrics_of_clients() -> None:
    merged = [line for r in simulate(PointsTask(), NOISE).ledger if r["kind"] == "version" for line in r["merged"]]
    assert len(merged) == 12
    assert [line for line in merged if line.get("metrics")] == []
    with_metrics = simulate(PointsTask(), {}).ledger
    assert all(line["metrics"] for r in with_metrics if r["kind"] == "version" for line in r["merged"])


def test_each_client_trains_the_jobs_that_its_epsilon_pays_for() -> None:
    result = simulate(PointsTask(), BUDGET, updates=100)
    assert not result.failed
    assert "no site trains further jobs: " in result.stopped_because
    assert "privacy.examples.epsilon: the job would bring client-" in result.stopped_because
    refused = [r["client"] for r in result.ledger if r["kind"] == "abandoned" and r["reason"] == "refused"]
    assert sorted(refused) == ["client-0", "client-1", "client-2"]
    assert result.jobs_dispatched == 3 * 4 + 3


def test_model_with_batch_norm_is_refused_before_the_run() -> None:
    with pytest.raises(ConfigurationError, match=r"privacy.examples: the model has BatchNorm1d \(1\)"):
        simulate(PointsTask(batch_norm=True), NOISE)


def test_loader_of_the_task_is_refused_before_the_run() -> None:
    class Loading(PointsTask):
        def train_data(self, client: Client) -> Any:
            return DataLoader(super().train_data(client))

    with pytest.raises(TaskError, match="is a DataLoader"):
        simulate(Loading(), NOISE)


@pytest.mark.parametrize("sections", [
    {"compression": {"uplink": "topk", "topk_ratio": 0.3}},
    {"compression": {"uplink": "int8"}},
    {"aggregation": {"strategy": "fedavg"}},
    {"aggregation": {"strategy": "fedasync"}},
    {"aggregation": {"buffer_size": 2, "weight_by_examples": True}},
    {"aggregation": {"buffer_size": 3}, "secure": {"keepers": ["one", "two"], "clip_norm": 10.0}},
])  # fmt: skip
def test_noise_goes_together_with_what_follows_it(sections: dict[str, Any]) -> None:
    result = simulate(PointsTask(), NOISE, **sections)
    assert result.history[-1]["accuracy"] > 0.6
