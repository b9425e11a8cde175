"""Fixtures for every test: one torch thread, a real server (required in CI), and a small run in Redis."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

import fakeredis
import pytest
import redis
import structlog
import torch
from hypothesis import settings

from fedqueue.errors import ServerUnavailable
from fedqueue.transport.connection import connect
from fedqueue_coordinator.operator.embedded_server import EmbeddedServer
from tests.support.sample_run import SampleRun

torch.set_num_threads(1)
# CI tries the same examples each time, so that only the change can cause a failure; a local run tries new examples.
settings.register_profile("fedqueue", deadline=None, max_examples=60, derandomize="CI" in os.environ)
settings.register_profile("fast", settings.get_profile("fedqueue"), max_examples=20)


def pytest_configure(config: pytest.Config) -> None:
    """Try fewer examples in a run without the slow tests, which is to answer within a minute."""
    settings.load_profile("fast" if "not slow" in config.option.markexpr else "fedqueue")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the slow tests, so that quick ones fill up all processes at the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove the developer's own FEDQUEUE_ variables, so that they configure no run."""
    for name in [name for name in os.environ if name.startswith("FEDQUEUE_")]:
        monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def _logging_restored() -> Iterator[None]:
    """Restore logging after each test, because a command line under test configures it for the whole process."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    structlog.reset_defaults()
    for handler in [h for h in root.handlers if h not in handlers]:
        root.removeHandler(handler)
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    """Start a real Redis server for the tests."""
    try:
        started = EmbeddedServer(tmp_path_factory.mktemp("server"))
    except ServerUnavailable as error:
        if os.environ.get("CI"):
            pytest.fail(f"CI must run these tests: {error}")
        pytest.skip(str(error))
    yield started
    started.stop()


@pytest.fixture
def server_client(server: EmbeddedServer) -> Iterator[redis.Redis]:
    """Empty the real server, and return a client of it."""
    client = connect(server.url)
    client.flushall()
    yield client
    client.connection_pool.disconnect()


@pytest.fixture
def fake_client() -> Iterator[redis.Redis]:
    client = fakeredis.FakeRedis(server=fakeredis.FakeServer())
    yield client
    client.close()


@pytest.fixture(params=["fakeredis", pytest.param("server", marks=pytest.mark.server)])
def redis_client(request: pytest.FixtureRequest) -> redis.Redis:
    """Run the same test on fakeredis, which is fast, and on the real server, which is exact."""
    client: redis.Redis = request.getfixturevalue("fake_client" if request.param == "fakeredis" else "server_client")
    return client


@pytest.fixture
def run(redis_client: redis.Redis) -> SampleRun:
    return SampleRun(redis_client)


@pytest.fixture
def fake_run(fake_client: redis.Redis) -> SampleRun:
    return SampleRun(fake_client)
