"""The built-in trackers write what the real libraries read back; each test needs its library."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fedqueue
from fedqueue import RunHooks
from fedqueue.config.trackers import BUILT_IN, MlflowConfig, TensorBoardConfig, WandbConfig
from fedqueue_coordinator.tracking.feed import run_start
from fedqueue_coordinator.tracking.narrator import Narrator
from fedqueue_coordinator.tracking.tensorboard_tracker import TensorBoardTracker
from tests.support.builders import make_config, same_bits
from tests.support.waiting import wait_until
from tests.tracking.test_feed import Line

pytestmark = pytest.mark.filterwarnings("default")  # the libraries' own deprecations are no fault of ours

BEGAN = 1_700_000_000.0


def version(number: int, clients: Iterable[str], staleness: Iterable[int], **more: Any) -> dict[str, Any]:
    merged = [{"client": c, "staleness": s} for c, s in zip(clients, staleness, strict=True)]
    return {"kind": "version", "version": number, "seconds": 2.0 * number, "merged": merged, **more}


RECORDS: list[dict[str, Any]] = [
    {"kind": "evaluation", "version": 0, "metrics": {"accuracy": 0.1, "acc@5": 0.5}, "seconds": 0.5},
    version(1, ["a", "b", "a"], [0, 1, 2]),
    {"kind": "rejected", "client": "b", "reason": "stale", "version": 1, "seconds": 2.5},
    version(2, ["a", "b", "c"], [0, 0, 0], privacy={"epsilon": 1.25, "client": "a"}),
    {"kind": "evaluation", "version": 2, "metrics": {"accuracy": 0.75, "acc@5": math.nan}, "seconds": 5.0},
]
"""Two versions of three updates, at 2 and 4 seconds."""
CURVES = {
    "run/updates": [(1, 3.0), (2, 6.0)],
    "run/versions_per_second": [(1, 0.5), (2, 0.5)],
    "buffer/staleness_mean": [(1, 1.0), (2, 0.0)],
    "buffer/clients": [(1, 2.0), (2, 3.0)],
    "rejected/stale": [(2, 1.0), (2, 1.0)],
    "privacy/epsilon": [(2, 1.25)],
    "central/accuracy": [(0, 0.1), (2, 0.75)],
    "central/accuracy_by_updates": [(0, 0.1), (6, 0.75)],
}


def track(hooks: RunHooks, folder: Path | None = None, records: Iterable[Mapping[str, Any]] = RECORDS) -> None:
    """Tell the story of a run, or of the part of one that continues, and end it."""
    config = make_config(name="fed", training={"learning_rate": 0.25})
    narrator, first = Narrator(), next(r["version"] for r in records)
    narrator.resume(first, 3 * first, 0.0)
    narrator.start(run_start(config, first, BEGAN)).make(hooks)
    for record in records:
        if call := narrator.tell(record):
            call.make(hooks)
    summary = {"run": "fed", "seconds": 5.0, "complete": True, "stopped_because": "versions: 2 of 2"}
    narrator.end({**summary, "folder": str(folder) if folder else None}).make(hooks)


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Return a folder as a run leaves it."""
    (tmp_path / "results").mkdir()
    for name in ("summary.json", "report.png", "model.safetensors", "coordinator.log"):
        (tmp_path / "results" / name).write_text(name)
    return tmp_path / "results"


CONTINUED = [version(2, ["a"], [0]), version(3, ["a"], [0])]


class RandomLine(Line):
    """Draws from every global generator while it trains."""

    def loss(self, model: Any, batch: Any) -> Any:
        noise = random.random() + float(np.random.rand()) + float(torch.rand(()))
        return super().loss(model, batch) * (1 + 0.1 * noise)


@pytest.mark.parametrize("name", BUILT_IN)
def test_tracker_leaves_the_bits_of_a_simulation_alone(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(name)
    monkeypatch.chdir(tmp_path)
    for variable in ("MLFLOW_ALLOW_FILE_STORE", "MLFLOW_DISABLE_TELEMETRY"):
        monkeypatch.setenv(variable, "true")
    settings: dict[str, Any] = {"clients": 4, "aggregation": {"buffer_size": 2}, "versions": 10}
    alone = fedqueue.simulate(RandomLine, **settings)
    followed = fedqueue.simulate(RandomLine, trackers={"use": [name], "end_seconds": 60}, **settings)
    assert same_bits(alone.model, followed.model)
    assert alone.ledger == followed.ledger


# TensorBoard


def read_events(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return events


def test_tensorboard_reads_the_curves_back(tmp_path: Path, results: Path) -> None:
    pytest.importorskip("tensorboard")
    track(TensorBoardTracker(TensorBoardConfig(folder=str(tmp_path / "events"))), results)
    [folder] = (tmp_path / "events" / "fed").iterdir()
    events = read_events(folder)
    curves = {name: [(e.step, round(e.value, 6)) for e in events.Scalars(name)] for name in CURVES}
    assert curves == CURVES
    assert [e.wall_time for e in events.Scalars("central/accuracy")] == [BEGAN + 0.5, BEGAN + 5.0]
    assert math.isnan(events.Scalars("central/acc@5")[-1].value)
    [table] = events.Tensors("configuration/text_summary")
    assert b"| training.learning_rate | `0.25` |" in table.tensor_proto.string_val[0]


def test_tensorboard_has_a_folder_for_each_start(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    for _ in range(2):
        track(TensorBoardTracker(TensorBoardConfig(folder=str(tmp_path))))
    first, second = sorted((tmp_path / "fed").iterdir())
    assert second.name.startswith(first.name) or second.name > first.name
    track(TensorBoardTracker(TensorBoardConfig(folder=str(tmp_path))), records=CONTINUED)
    assert sorted((tmp_path / "fed").iterdir()) == [first, second]
    assert [e.step for e in read_events(second).Scalars("run/updates")][-1] == 3


# MLflow


def test_mlflow_reads_the_curves_and_artifacts_back(
    tmp_path: Path, results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow")
    from mlflow import MlflowClient

    from fedqueue_coordinator.tracking.mlflow_tracker import MlflowTracker

    for variable in ("MLFLOW_ALLOW_FILE_STORE", "MLFLOW_DISABLE_TELEMETRY"):
        monkeypatch.setenv(variable, "true")  # as the tracker does, and restored after the test
    settings = MlflowConfig(uri=str(tmp_path / "mlruns"), experiment="hospitals")
    track(MlflowTracker(settings), results)
    client = MlflowClient(settings.uri)
    experiment = client.get_experiment_by_name("hospitals")
    assert experiment is not None
    [run] = client.search_runs([experiment.experiment_id])
    curves = {name: [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, name)] for name in CURVES}
    assert curves == CURVES
    assert math.isnan(client.get_metric_history(run.info.run_id, "central/acc_5")[-1].value)
    assert run.data.params["training.learning_rate"] == "0.25"
    assert (run.info.run_name, run.info.status, run.data.tags["fedqueue.run"]) == ("fed", "FINISHED", "fed")
    assert run.info.end_time - run.info.start_time == 5000
    listed = [artifact.path for artifact in client.list_artifacts(run.info.run_id)]
    assert sorted(listed) == ["model.safetensors", "report.png", "summary.json"]
    track(MlflowTracker(settings), records=CONTINUED)
    [same] = client.search_runs([experiment.experiment_id])
    assert same.info.run_id == run.info.run_id
    assert [m.step for m in client.get_metric_history(run.info.run_id, "run/updates")] == [1, 2, 2, 3]


# Weights & Biases


def test_wandb_writes_a_run_for_its_sync(tmp_path: Path, results: Path) -> None:
    pytest.importorskip("wandb")
    from fedqueue_coordinator.tracking.wandb_tracker import WandbTracker

    settings = WandbConfig(folder=str(tmp_path))
    track(WandbTracker(settings), results)
    [run] = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    content = wait_until(
        lambda: data if b"fed-results" in (data := run.read_bytes()) else b"", "wandb's service to write"
    )
    written = ("learning_rate", "versions: 2 of 2", "model.safetensors", "fed-results")
    for text in (*(name for name in CURVES if "_by_updates" not in name), *written):
        assert text.encode() in content, text
    assert re.fullmatch(r"run-fed\.[0-9a-f]{8}\.wandb", run.name)
    track(WandbTracker(settings), records=CONTINUED)
    names = {path.name for path in (tmp_path / "wandb").glob("offline-run-*/*.wandb")}
    assert names == {run.name}, "a run that continues has another id"
