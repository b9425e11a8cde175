"""The coordinator's process and its evaluations: results that Redis missed, and ends after which a run continues."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import redis
import torch

from fedqueue import Task
from fedqueue.config.loading import parse_config
from fedqueue.errors import ConfigurationError
from fedqueue.protocol.stream_entry import StreamEntry
from fedqueue_coordinator.core.events import Stop
from fedqueue_coordinator.service.coordinator import Coordinator
from fedqueue_coordinator.service.coordinator_store import CoordinatorStore
from tests.support.scripted_run import result_of


class Line(Task):
    def model(self) -> Any:
        return torch.nn.Linear(2, 1)

    def test_data(self) -> list[int]:
        return [0]

    def evaluate(self, model: Any, data: list[int]) -> dict[str, Any]:
        return {"acc": 0.25, "auc": math.nan}


class Scripted(CoordinatorStore):
    """A store that runs one step where the coordinator would wait for entries, and misses the first reports."""

    steps: list[Callable[[], object]]
    misses = 0

    def receive(self, block_seconds: float, count: int = 32) -> list[StreamEntry]:
        self.steps.pop(0)()
        return []

    def report(self, kind: str, body: bytes) -> None:
        if self.misses:
            self.misses -= 1
            raise redis.ConnectionError("reset by peer")
        super().report(kind, body)


def coordinator_of(
    client: redis.Redis, folder: Path, *steps: Callable[..., Any], target: dict[str, Any] | None = None, misses: int = 0
) -> Coordinator:
    """Return a coordinator of a run without clients; the coordinator is paused after the steps."""
    stop = {"target": target} if target else {"versions": 9}
    config = parse_config({"name": "line", "task": {"entrypoint": "task.py:Line"}, "stop": stop})
    store = Scripted(client, "line", "me")
    clock = itertools.count(1.0).__next__
    coordinator = Coordinator(config, Line(), store, folder, clock=clock, sleep=lambda seconds: None)
    assert coordinator._evaluator is not None
    settle = [coordinator._evaluator.join] * 10
    store.steps, store.misses = [*steps, *settle, coordinator.pause], misses
    return coordinator


def test_nan_of_an_evaluation_is_in_the_ledger(fake_client: redis.Redis, tmp_path: Path) -> None:
    coordinator = coordinator_of(fake_client, tmp_path)
    coordinator.run()
    (record,) = coordinator.store.ledger()
    assert (record["kind"], record["version"], record["metrics"]["acc"]) == ("evaluation", 0, 0.25)
    assert math.isnan(record["metrics"]["auc"])
    assert "error" not in record


def test_evaluation_that_redis_missed_is_reported_again(fake_client: redis.Redis, tmp_path: Path) -> None:
    coordinator = coordinator_of(fake_client, tmp_path, misses=2)
    coordinator.run()
    assert coordinator.federation.evaluated is not None
    assert coordinator.federation.evaluated.metrics["acc"] == 0.25
    assert [record["kind"] for record in coordinator.store.ledger()] == ["evaluation"]


def test_run_continues_once_its_unusable_target_is_corrected(fake_client: redis.Redis, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"^stop.target: accuracy is not measured: .* returned acc, auc"):
        coordinator_of(fake_client, tmp_path, target={"accuracy": 0.9}).run()
    corrected = coordinator_of(fake_client, tmp_path, target={"acc": 0.9})
    assert corrected.store.info().state == "running"
    assert corrected.run() is None
    assert corrected.federation.evaluated is not None
    assert corrected.federation.evaluated.metrics["acc"] == 0.25


def test_run_that_failed_in_its_evaluations_stays_in_redis(fake_client: redis.Redis, tmp_path: Path) -> None:
    def fail() -> None:
        stop = Stop("the evaluation failed 5 times in a row", failed=True, resumable=True)
        coordinator._perform(coordinator.federation.stop(stop, 3.0))

    coordinator = coordinator_of(fake_client, tmp_path, fail)
    result = result_of(coordinator)
    assert (result.failed, result.resumable, result.seconds > 3.0) == (True, True, True)
    assert coordinator.store.info().state == "running"
    assert coordinator_of(fake_client, tmp_path).run() is None, "the next coordinator was not paused"
