"""Whole runs: real processes, driven as a user drives them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from fedqueue.errors import RunNotFound
from fedqueue_coordinator.operator.access.enrolment import enroll_missing
from fedqueue_coordinator.operator.embedded_server import EmbeddedServer

TASK = Path(__file__).parent / "toy_task.py"
PATIENCE = 240.0  # seconds; a loaded machine imports torch slowly

CONFIG = """
name = "toy"
[task]
entrypoint = "{task}:ToyTask"
[clients]
count = 4
[training]
learning_rate = 0.1
batch_size = 16
[aggregation]
buffer_size = 2
[dispatch]
lease_seconds = 4
[security]
keys = "{keys}"
[stop]
versions = 12
seconds = 600
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "federation.toml"
    path.write_text(CONFIG.format(task=TASK, keys=tmp_path / "keys"))
    enroll_missing(tmp_path / "keys", [f"client-{i}" for i in range(4)], site=tmp_path / "keys")
    return path


class Program:
    """A command of the product in a process of its own, in a folder of its own, and what it printed."""

    def __init__(self, module: str, *arguments: object, folder: Path, **environment: str) -> None:
        self.log = folder / f"{module}-{time.monotonic_ns()}.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", module, *map(str, arguments)],
                cwd=folder,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
            )

    def wait(self, seconds: float = PATIENCE) -> int:
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {seconds} s:\n{self.text}") from None

    def send(self, signum: int) -> None:
        self.process.send_signal(signum)

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace")


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Program]]:
    """Starts a program; at the end of the test, those still running are killed."""
    programs: list[Program] = []

    def starter(module: str, *arguments: object, **environment: str) -> Program:
        programs.append(Program(module, *arguments, folder=tmp_path, **environment))
        return programs[-1]

    yield starter
    for program in programs:
        if program.process.poll() is None:
            program.send(signal.SIGKILL)
            program.process.wait()


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[EmbeddedServer]:
    server = EmbeddedServer(tmp_path / "redis")
    yield server
    server.stop()


def client_of(server: EmbeddedServer) -> redis.Redis:
    return redis.Redis.from_url(server.url)


def wait_until(condition: Callable[[], Any], what: str, seconds: float = PATIENCE) -> Any:
    """The first truthy value of `condition`; an error of a server that is not there yet counts as no."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(redis.RedisError, RunNotFound, FileNotFoundError):
            if value := condition():
                return value
        time.sleep(0.05)
    raise AssertionError(f"not within {seconds} s: {what}")


def children(pid: int) -> list[int]:
    """Processes whose parent is `pid`."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(stat.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(stat.parent.name))
    return found


def descendants(pid: int) -> list[int]:
    """Processes below `pid`, whatever lies between."""
    below = children(pid)
    return below + [further for child in below for further in descendants(child)]


def worker_pids(folder: Path, count: int) -> list[int]:
    """Of the workers of a local run with its results in `folder`, by number, once all of them are ready."""
    logs = [folder / "logs" / f"worker-{i}.log" for i in range(count)]
    wait_until(lambda: all("ready" in log.read_text() for log in logs), "the workers are ready")
    return [int(log.read_text().rpartition("pid=")[2].split()[0]) for log in logs]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until_ended(pids: list[int]) -> None:
    """All of these processes; a failure names those that are left."""
    try:
        wait_until(lambda: not any(map(alive, pids)), "its processes end")
    except AssertionError as error:
        left = {pid: Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ") for pid in pids if alive(pid)}
        raise AssertionError(f"{error}; left: {left}") from None


def read_results(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    summary = json.loads((folder / "summary.json").read_text())
    ledger = [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]
    return summary, ledger
