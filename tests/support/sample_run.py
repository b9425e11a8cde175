"""A run with a small model on a Redis server, led by its coordinator's store, without the coordinator's service."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import redis

from fedqueue.config.loading import parse_config
from fedqueue.config.training import TrainingConfig
from fedqueue.protocol.coordinator_identity import load_coordinator_identity
from fedqueue.protocol.messages import Order, Registration, Update
from fedqueue.protocol.site_identity import SiteIdentity
from fedqueue.protocol.stream_entry import StreamEntry
from fedqueue.tensors.frame import Frame
from fedqueue.tensors.manifest import Manifest
from fedqueue.transport.rq_jobs import Queues, RqJobRecord
from fedqueue.transport.worker_store import Claim, WorkerStore
from fedqueue_coordinator.service.coordinator_store import CoordinatorStore
from tests.support.builders import constant_frame, make_update
from tests.support.small_task import SmallTask

Buffer = npt.NDArray[np.uint8]


class SampleRun:
    """A run at version 0 (all elements 0), led by `coordinator`; the small model has a buffer and a counter.

    With `keys`, a folder, its coordinator signs; without `batch_norm`, the model has parameters only.
    """

    def __init__(
        self,
        client: redis.Redis,
        name: str = "sample",
        keys: Path | None = None,
        batch_norm: bool = True,
        **sections: Any,
    ) -> None:
        self.client, self.name = client, name
        tree = {"name": name, "task": {"entrypoint": "task.py:T"}, "stop": {"versions": 99}, **sections}
        self.config = parse_config(tree)
        self.module = SmallTask(batch_norm).model()
        self.manifest = Manifest.from_module(self.module)
        identity = load_coordinator_identity(keys, name) if keys else None
        self.coordinator = CoordinatorStore(client, name, "owner-a", identity)
        self.keys = self.coordinator.keys
        assert self.coordinator.lead(60)
        self.coordinator.create(self.config.model_dump_json(), self.manifest)
        self.publish(0)

    def worker(self, token: str = "worker-a", identity: SiteIdentity | None = None) -> WorkerStore:
        return WorkerStore(self.client, self.name, token, identity)

    def join(self, client: str = "c0", token: str = "worker-a", lease: float = 60) -> WorkerStore:
        """Make a worker that serves the client, registered with 10 examples."""
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

    def payload(self, value: float = 1.0) -> Buffer:
        """Make an update's bytes with `value` in all floats."""
        return constant_frame(self.manifest, value).buffer

    def update(self, payload: Buffer, **fields: Any) -> Update:
        """Make the header for the payload."""
        return make_update(payload.nbytes, **fields)

    def posted_frame(self, entry: StreamEntry) -> Frame:
        """Decode the payload that the worker posted with this entry."""
        frame = Frame(self.manifest)
        self.coordinator.read_blob(self.keys.payload(entry.job, entry.attempt), frame.buffer)
        return frame

    def post(self, worker: WorkerStore, claim: Claim, value: float = 1.0) -> str:
        payload = self.payload(value)
        return worker.post(claim, self.update(payload), payload)

    def posted(self, number: int = 1, client: str = "c0", token: str = "worker-a") -> Claim:
        """Take a job from its dispatch to its accepted update."""
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
        """Return the names of all keys of the run, without the run's prefix."""
        prefix = f"fedqueue:{{{self.name}}}:"
        return {key.decode().removeprefix(prefix) for key in self.client.scan_iter(match=prefix + "*")}

    def contents(self) -> dict[str, Any]:
        """Return everything in Redis, to compare before and after a step."""
        readers: dict[bytes, Callable[[bytes], Any]] = {
            b"string": self.client.get,
            b"hash": self.client.hgetall,
            b"set": self.client.smembers,
            b"zset": lambda k: self.client.zrange(k, 0, -1, withscores=True),
            b"list": lambda k: self.client.lrange(k, 0, -1),
            b"stream": self.client.xrange,
        }
        return {
            key.decode(): readers[self.client.type(key)](key)  # type: ignore[index]
            for key in self.client.scan_iter()
        }
