"""`fedqueue-worker` as a process: loader workers that are started in every way, and a device of the site's own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import redis

from fedqueue_coordinator.operator.embedded_server import EmbeddedServer
from tests.support.sample_run import SampleRun

pytestmark = [pytest.mark.server, pytest.mark.slow]

TASK = """
import torch
from torch.utils.data import DataLoader, Dataset
from fedqueue import Task

class Rows(Dataset):
    def __len__(self): return 10
    def __getitem__(self, i): return torch.full((3,), float(i)), i % 2

class Loaded(Task):
    def __init__(self, start="fork"):
        self.start = start
    def model(self):
        return torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    def train_data(self, client):
        return DataLoader(Rows(), batch_size=5, num_workers=2, multiprocessing_context=self.start)
"""
CONFIG = """
name = "sample"
[task]
entrypoint = "task.py:Loaded"
[clients]
count = 8
[stop]
versions = 99
[security]
signatures = "off"
"""


@pytest.fixture
def work(server: EmbeddedServer, server_client: redis.Redis, tmp_path: Path) -> Any:
    """Run a worker of client-0 for one job; return the run and the finished process."""
    (tmp_path / "task.py").write_text(TASK)
    (tmp_path / "federation.toml").write_text(CONFIG)
    sample = SampleRun(server_client)
    sample.dispatch(1, "client-0")

    def start(*options: Any) -> tuple[Any, ...]:
        command = [sys.executable, "-m", "fedqueue_worker", "federation.toml", "-u", server.url, "--client", "client-0"]
        done = subprocess.run(
            [*command, "--max-jobs", "1", *options],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=150,
            check=False,
        )
        return sample, done

    return start


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_job_trains_with_loader_workers(work: Any, method: str) -> None:
    sample, done = work("--set", f"task.options.start={method}", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert len(sample.updates()) == 1, done.stderr


def test_device_that_the_site_lacks_ends_the_worker(work: Any) -> None:
    sample, done = work("--device", "cuda:99")
    assert (done.returncode, sample.updates()) == (2, [])
    assert "training.device = 'cuda:99'" in done.stderr.splitlines()[-1]
