"""The coordinator's process: setup before leadership."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import redis
import torch

from fedqueue import Task
from fedqueue.config.loading import parse_config
from fedqueue.protocol.stream_entry import StreamEntry
from fedqueue_coordinator.service.coordinator import Coordinator
from fedqueue_coordinator.service.coordinator_store import CoordinatorStore


class Line(Task):
    def model(self) -> Any:
        return torch.nn.Linear(2, 1)


def test_coordinator_merges_with_the_configured_threads(fake_client: redis.Redis, tmp_path: Path) -> None:
    tree = {"task": {"entrypoint": "task.py:Line"}, "stop": {"versions": 1}}
    threads = torch.get_num_threads()
    try:
        for told in (2, 1):
            config = parse_config({**tree, "aggregation": {"threads": told}})
            Coordinator(config, Line(), CoordinatorStore(fake_client, "run", "me"), tmp_path)
            assert torch.get_num_threads() == told
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("owned", [True, False])
def test_checkpoint_is_written_to_an_own_folder_only(fake_client: redis.Redis, tmp_path: Path, owned: bool) -> None:
    tree = {"task": {"entrypoint": "task.py:Line"}, "stop": {"versions": 1}, "checkpoint": {"every_seconds": 1e-6}}
    store = CoordinatorStore(fake_client, "run", "me")
    coordinator = Coordinator(parse_config(tree), Line(), store, tmp_path, owns_folder=lambda: owned)

    def no_entries(block_seconds: float, count: int = 32) -> list[StreamEntry]:
        coordinator.interrupt("interrupted")
        return []

    store.receive = no_entries  # type: ignore[method-assign]
    coordinator.run()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.safetensors"] * owned
