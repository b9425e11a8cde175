"""Fixtures for whole runs: a configuration file with keys, real programs and a real server."""

from __future__ import annotations

import functools
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fedqueue_coordinator.operator.access.enrolment import enroll_missing
from fedqueue_coordinator.operator.embedded_server import EmbeddedServer
from tests.support import toy_task
from tests.support.programs import Program

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
    path.write_text(CONFIG.format(task=toy_task.__file__, keys=tmp_path / "keys"))
    enroll_missing(tmp_path / "keys", [f"client-{i}" for i in range(4)], site=tmp_path / "keys")
    return path


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Program]]:
    """Start a program in a new interpreter; kill all that still run at the end of the test."""
    programs: list[Program] = []

    def starter(module: str, *arguments: object, cold: bool = True, **environment: str) -> Program:
        programs.append(Program(module, *arguments, folder=tmp_path, cold=cold, **environment))
        return programs[-1]

    yield starter
    for program in programs:
        program.send(signal.SIGKILL)
        program.wait()


@pytest.fixture
def fork(start: Callable[..., Program]) -> Callable[..., Program]:
    """Start a program as `start` does, but forked from a process that has already imported it."""
    return functools.partial(start, cold=False)


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[EmbeddedServer]:
    server = EmbeddedServer(tmp_path / "redis")
    yield server
    server.stop()
