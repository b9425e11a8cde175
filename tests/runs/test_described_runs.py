"""Runs whose task is prepared with statistics: coordinator and workers scale alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fedqueue
from fedqueue import Client, Task
from fedqueue.statistics.pooled import Statistics
from fedqueue_coordinator.operator.describe import describe_here


class Scaled(Task):
    """Trains on rows from which the mean over all clients is subtracted; without `prepare`, no data can be loaded."""

    def table(self, client: Client) -> dict[str, np.ndarray]:
        return {"x": np.arange(50.0) + 100 * (client.partition or 0)}

    def prepare(self, statistics: Statistics) -> None:
        self.mean = statistics.numbers("x").mean or 0.0

    def model(self) -> torch.nn.Module:
        return torch.nn.Linear(1, 2)

    def train_data(self, client: Client) -> torch.utils.data.Dataset[tuple[torch.Tensor, ...]]:
        x = torch.from_numpy(self.table(client)["x"]).float()[:, None] - self.mean
        return torch.utils.data.TensorDataset(x, (x[:, 0] > 0).long())

    def test_data(self) -> torch.utils.data.Dataset[tuple[torch.Tensor, ...]]:
        return self.train_data(Client("test", 0, 1))


SETTINGS: dict[str, Any] = {"clients": {"count": 2}, "stop": {"versions": 3}, "statistics": {"file": "statistics.json"}}


@pytest.fixture
def described(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    from tests.support.builders import make_config  # here: workers import the head of this file from another folder

    monkeypatch.chdir(tmp_path)
    found = describe_here(make_config(clients={"count": 2}), Scaled())
    (tmp_path / "statistics.json").write_text(found.model_dump_json())
    return tmp_path


def test_a_simulation_prepares_the_task(described: Path) -> None:
    assert fedqueue.simulate(Scaled, **SETTINGS).version == 3


def test_a_simulation_without_the_file_says_so(described: Path) -> None:
    (described / "statistics.json").unlink()
    with pytest.raises(fedqueue.ConfigurationError, match=r"statistics\.file = .* cannot be read"):
        fedqueue.simulate(Scaled, **SETTINGS)


@pytest.mark.slow
@pytest.mark.server
def test_workers_are_prepared_from_the_runs_configuration(described: Path) -> None:
    task = described / "scaled.py"
    task.write_text(Path(__file__).read_text().partition("SETTINGS")[0])
    result = fedqueue.run({"task": {"entrypoint": "scaled.py:Scaled"}, **SETTINGS}, folder="out", workers=1)
    assert result.version == 3
    assert json.loads((described / "out" / "summary.json").read_text())["updates_merged"] >= 3
