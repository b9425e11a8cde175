"""The coordinator's process: setup before leadership."""

from __future__ import annotations

import torch

from fedqueue import Task
from fedqueue.config.loading import parse_config
from fedqueue_coordinator.service.coordinator import Coordinator
from fedqueue_coordinator.service.coordinator_store import CoordinatorStore


class Line(Task):
    def model(self):
        return torch.nn.Linear(2, 1)


def test_coordinator_merges_with_the_configured_threads(fake_client, tmp_path):
    tree = {"task": {"entrypoint": "task.py:Line"}, "stop": {"versions": 1}}
    threads = torch.get_num_threads()
    try:
        for told in (2, 1):
            config = parse_config({**tree, "aggregation": {"threads": told}})
            Coordinator(config, Line(), CoordinatorStore(fake_client, "run", "me"), tmp_path)
            assert torch.get_num_threads() == told
    finally:
        torch.set_num_threads(threads)
