"""The coordinator's process: setup before leadership."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import redis
import torch

from fedqueue import Task
from fedqueue.config.loading import parse_config
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
