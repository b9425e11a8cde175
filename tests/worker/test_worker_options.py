"""`fedqueue-worker` as a process on a real server: the options for ending and logging."""

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
from torch.utils.data import TensorDataset
from fedqueue import Task

class Random(Task):
    def model(self):
        return torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))

    def train_data(self, client):
        return TensorDataset(torch.randn(10, 3), torch.randint(0, 2, (10,)))
"""
CONFIG = """
name = "sample"
[task]
entrypoint = "task.py:Random"
[clients]
count = 8
[stop]
versions = 99
[security]
signatures = "off"
"""


@pytest.fixture
def sample(server_client: redis.Redis) -> SampleRun:
    return SampleRun(server_client)


@pytest.fixture
def work(server: EmbeddedServer, sample: SampleRun, tmp_path: Path) -> Any:
    """Run a worker of client-0 to its end; return the finished process."""
    (tmp_path / "task.py").write_text(TASK)
    (tmp_path / "federation.toml").write_text(CONFIG)

    def start(*options: Any) -> Any:
        command = [sys.executable, "-m", "fedqueue_worker", "federation.toml", "-u", server.url, "--client", "client-0"]
        return subprocess.run(
            [*command, *options], cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False
        )

    return start


def test_burst_on_an_empty_queue_ends_with_0(work: Any, sample: SampleRun) -> None:
    done = work("--burst")
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "fedqueue-worker: no job is waiting (burst)"
    assert [entry.kind for entry in sample.coordinator.unacknowledged()] == ["joined", "left"]


def test_max_jobs_1_trains_one_of_two_jobs(work: Any, sample: SampleRun) -> None:
    sample.dispatch(1, "client-0")
    sample.dispatch(2, "client-0")
    done = work("--max-jobs", "1", "-v")
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "fedqueue-worker: max_jobs reached: 1"
    assert "[debug    ] update posted" in done.stderr
    assert [entry.job for entry in sample.updates()] == ["sample-00000001"]


def test_verbose_reaches_the_logs_of_forked_processes(work: Any, sample: SampleRun, tmp_path: Path) -> None:
    sample.dispatch(1, "client-0")
    done = work("--max-jobs", "1", "--logs", "logs", "--verbose")
    assert done.returncode == 0, done.stderr
    assert "update posted" in (tmp_path / "logs" / "worker-0.log").read_text()


def test_without_verbose_no_debug_line_is_logged(work: Any, sample: SampleRun) -> None:
    sample.dispatch(1, "client-0")
    done = work("--burst")
    assert "ready" in done.stderr
    assert "update posted" not in done.stderr
    assert len(sample.updates()) == 1


def test_quiet_worker_prints_nothing(work: Any, sample: SampleRun) -> None:
    sample.dispatch(1, "client-0")
    done = work("--burst", "-q")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert len(sample.updates()) == 1
