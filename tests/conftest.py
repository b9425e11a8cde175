"""Fixtures for every test: one thread for torch, a real server that CI may not do without, and a small run in Redis."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from typing import Any

import fakeredis
import numpy as np
import pytest
import redis
import structlog
import torch
from hypothesis import settings

from fedqueue.config.loading import parse_config
from fedqueue.config.training import TrainingConfig
from fedqueue.errors import ServerUnavailable
from fedqueue.protocol.messages import Order, Registration, Update
from fedqueue.protocol.stream_entry import StreamEntry
from fedqueue.tensors.frame import Frame, Manifest
from fedqueue.transport.connection import connect
from fedqueue.transport.rq_jobs import Queues, RqJobRecord
from fedqueue.transport.store import chunks_of
from fedqueue.transport.worker_store import Claim, WorkerStore
from fedqueue_coordinator.operator.embedded_server import EmbeddedServer
from fedqueue_coordinator.service.coordinator_store import CoordinatorStore

torch.set_num_threads(1)
# CI tries the same examples each time: what it finds is about the change; whoever runs the tests by hand explores.
settings.register_profile("fedqueue", deadline=None, max_examples=60, derandomize="CI" in os.environ)
settings.load_profile("fedqueue")


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No variable of whoever runs the tests configures a run."""
    for name in [name for name in os.environ if name.startswith("FEDQUEUE_")]:
        monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def _logging_restored() -> Iterator[None]:
    """A command line under test sets up logging for its process: here it lasts for one test."""
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
    """A real server of the tests' own."""
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
    """The real server, empty."""
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
    """The same test on both: fakeredis for speed, the real server for truth."""
    client: redis.Redis = request.getfixturevalue("fake_client" if request.param == "fakeredis" else "server_client")
    return client


class SampleRun:
    """A run with a small model with a buffer and a counter, led by `coordinator`, at version 0 (all elements 0)."""

    def __init__(self, client: redis.Redis, name: str = "sample", **sections: Any) -> None:
        self.client, self.name = client, name
        tree = {"name": name, "task": {"entrypoint": "task.py:T"}, "stop": {"versions": 99}, **sections}
        self.config = parse_config(tree)
        self.module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
        self.manifest = Manifest.from_module(self.module)
        self.coordinator = CoordinatorStore(client, name, "owner-a")
        self.keys = self.coordinator.keys
        assert self.coordinator.lead(60)
        self.coordinator.create(self.config.model_dump_json(), self.manifest)
        self.publish(0)

    def worker(self, token: str = "worker-a") -> WorkerStore:
        return WorkerStore(self.client, self.name, token)

    def join(self, client: str = "c0", token: str = "worker-a", lease: float = 60) -> WorkerStore:
        """A worker that serves the client, registered with 10 examples."""
        worker = self.worker(token)
        assert worker.join([client], lease) == client
        assert worker.register(Registration(client=client, examples=10))
        return worker

    def order(self, number: int = 1, client: str = "c0") -> Order:
        job = f"{self.name}-{number:08d}"
        return Order(run=self.name, job=job, client=client, seed=number, training=TrainingConfig())

    def dispatch(self, number: int = 1, client: str = "c0", lease: float = 60) -> str:
        order = self.order(number, client)
        self.dispatch_order(order, number, lease)
        return order.job

    def dispatch_order(self, order: Order, number: int, lease: float = 60) -> None:
        packed = self.coordinator.pack_order(order)
        self.coordinator.dispatch(order, packed, self.record(order), number, lease)

    def record(self, order: Order) -> RqJobRecord:
        envelope = self.coordinator.pack_order(order) if self.coordinator.identity else None
        return Queues(self.client).record(self.keys.queue(order.client), order, envelope)

    def payload(self, value: float = 1.0) -> Any:
        frame = Frame(self.manifest)
        frame.floats.fill_(value)
        return frame.buffer

    def update(self, payload: Any, **fields: Any) -> Update:
        described = {"examples": 10, "nbytes": payload.nbytes, "chunks": chunks_of(payload.nbytes), "seconds": 0.5}
        return Update(**{**described, **fields})

    def post(self, worker: WorkerStore, claim: Claim, value: float = 1.0) -> str:
        payload = self.payload(value)
        return worker.post(claim, self.update(payload), payload)

    def posted(self, number: int = 1, client: str = "c0", token: str = "worker-a") -> Claim:
        """A job from its dispatch to its accepted update."""
        worker = self.worker(token)
        claim = worker.claim(self.dispatch(number, client), 60)
        assert self.post(worker, claim) == ""
        return claim

    def publish(self, version: int, merged: list[StreamEntry] | None = None, state: bytes = b"") -> set[int]:
        records = [{"kind": "version", "version": version, "merged": []}] if version else []
        model = self.payload(float(version))
        return self.coordinator.publish(
            version, model, np.frombuffer(state, np.uint8), records, {"updates": version}, merged or []
        )

    def updates(self) -> list[StreamEntry]:
        return [e for e in self.coordinator.unacknowledged() if e.kind == "update"]

    def names(self) -> set[str]:
        """The names of all keys of the run, without the run's prefix."""
        prefix = f"fedqueue:{{{self.name}}}:"
        return {key.decode().removeprefix(prefix) for key in self.client.scan_iter(match=prefix + "*")}

    def contents(self) -> dict[str, Any]:
        """Everything that Redis holds, to compare before and after."""
        readers = {
            b"string": self.client.get,
            b"hash": self.client.hgetall,
            b"set": self.client.smembers,
            b"zset": lambda k: self.client.zrange(k, 0, -1, withscores=True),
            b"list": lambda k: self.client.lrange(k, 0, -1),
            b"stream": self.client.xrange,
        }
        return {key.decode(): readers[self.client.type(key)](key) for key in self.client.scan_iter()}


@pytest.fixture
def new_run() -> type[SampleRun]:
    return SampleRun


@pytest.fixture
def run(redis_client: redis.Redis) -> SampleRun:
    return SampleRun(redis_client)


@pytest.fixture
def fake_run(fake_client: redis.Redis) -> SampleRun:
    return SampleRun(fake_client)
