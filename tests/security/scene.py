"""A signed federation in one process, with an attacker who owns Redis: the real coordinator, real sites, real keys."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import redis
import torch

from fedqueue import Client, Task
from fedqueue.config.loading import parse_config
from fedqueue.protocol.coordinator_identity import CoordinatorIdentity, load_coordinator_identity
from fedqueue.protocol.keys import Keys
from fedqueue.protocol.messages import Registration, Update
from fedqueue.protocol.site_identity import load_site_identity
from fedqueue.protocol.stream_entry import StreamEntry
from fedqueue.tensors.codec import Codec
from fedqueue.tensors.frame import Frame, Manifest
from fedqueue.transport.store import Store
from fedqueue.transport.worker_store import Claim, WorkerStore
from fedqueue_coordinator.operator.access.enrolment import enroll_missing
from fedqueue_coordinator.service.coordinator import Coordinator
from fedqueue_coordinator.service.coordinator_store import CoordinatorStore, new_owner

RUN = "scene"
EXAMPLES = 10


class SmallTask(Task):
    def model(self) -> torch.nn.Module:
        return torch.nn.Linear(3, 2)

    def train_data(self, client: Client) -> Any:
        raise AssertionError("the sites follow a script")


class ScriptedStore(CoordinatorStore):
    """Takes one step of the script before each read of the stream; after the last, the coordinator leaves the run."""

    steps: list[Callable[[], object]]
    leave: Callable[[], None]

    def receive(self, block_seconds: float, count: int = 32) -> list[StreamEntry]:
        if self.steps:
            self.steps.pop(0)()
        else:
            self.leave()
        return super().sweep(count)  # whoever forges an entry need not ring the bell


class Scene:
    """Clients c0 and c1 are enrolled; FedAsync adds each delta as it is, so that every update makes a version."""

    def __init__(self, client: redis.Redis, folder: Path, signed: bool = True, **sections: Any) -> None:
        self.redis, self.folder, self.signed = client, folder, signed
        self.keys, self.key_folder = Keys(RUN), folder / "keys"
        self.manifest = Manifest.from_module(SmallTask().model())
        self.config = parse_config(
            {
                "name": RUN,
                "task": {"entrypoint": "task.py:SmallTask"},
                "clients": {"names": ["c0", "c1"]},
                "aggregation": {
                    "mode": "fedasync", "alpha": 1.0, "mixing": "delta", "staleness": {"function": "constant"},
                },
                "server_optimizer": {"options": {"momentum": 0.5}},
                "dispatch": {"lease_seconds": 3600, "leader_seconds": 3600, "backoff_seconds": 1e-6},
                "checkpoint": {"seconds": 0},
                "stop": {"versions": 1000},
                **sections,
            }
        )  # fmt: skip
        enroll_missing(self.key_folder, ["c0", "c1"])
        self.coordinator: Coordinator

    def identity(self) -> CoordinatorIdentity:
        return load_coordinator_identity(self.key_folder, RUN)

    def play(self, *steps: Callable[[], object]) -> Coordinator:
        """A coordinator takes the lead, then the steps happen one after another; it leaves the run as it is."""
        store = ScriptedStore(self.redis, RUN, new_owner(), self.identity() if self.signed else None)
        now = 0.0

        def clock() -> float:
            nonlocal now
            now += 1.0
            return now

        self.coordinator = Coordinator(
            self.config, SmallTask(), store, self.folder, clock=clock, sleep=lambda seconds: None
        )
        store.steps, store.leave = list(steps), self.coordinator.pause
        self.coordinator.run()
        return self.coordinator

    def site(self, client: str, session: str = "session", folder: Path | None = None) -> Site:
        return Site(self, client, session, folder or self.key_folder / "sites" / client)

    @property
    def store(self) -> Store:
        return Store(self.redis, RUN)

    def reasons(self) -> list[str]:
        """Why jobs ended without a merge, and entries were refused, in order."""
        return [r["reason"] for r in self.store.ledger() if r["kind"] in ("rejected", "abandoned")]

    @property
    def version(self) -> int:
        return self.store.info().version

    def model(self) -> bytes:
        return self.store.read_model(self.version, Codec(self.manifest)).buffer.tobytes()

    def entries(self, client: str = "c0") -> list[tuple[bytes, dict[bytes, bytes]]]:
        return self.redis.xrange(self.keys.updates(client))  # type: ignore[return-value]

    def snapshot(self) -> dict[bytes, bytes]:
        """All of Redis, as its thief would copy it."""
        return {key: self.redis.dump(key) for key in self.redis.scan_iter()}  # type: ignore[misc]

    def roll_back(self, snapshot: dict[bytes, bytes]) -> None:
        self.redis.flushall()
        for key, value in snapshot.items():
            self.redis.restore(key, 0, value)


class Site:
    """One client's worker, without the training."""

    def __init__(self, scene: Scene, client: str, session: str, folder: Path) -> None:
        self.scene, self.client = scene, client
        self.identity = load_site_identity(folder, RUN, session) if scene.signed else None
        self.store = WorkerStore(scene.redis, RUN, session, self.identity)
        self.claims: list[Claim] = []

    def join(self, examples: int = EXAMPLES) -> None:
        if self.identity:
            self.identity.enter(self.store.info())
        assert self.store.join([self.client], 3600) == self.client
        assert self.store.register(Registration(client=self.client, examples=examples))

    def leave(self) -> None:
        self.store.leave([self.client])

    @property
    def job(self) -> str:
        """The one that waits for it."""
        record = self.scene.redis.hget(self.scene.keys.site(self.client), "job")
        return record.decode() if record else ""  # type: ignore[union-attr]

    def order(self) -> bytes:
        return self.scene.redis.hget(self.scene.keys.job(self.job), "order")  # type: ignore[return-value]

    def fetch(self) -> Claim:
        """Claim the job, and fetch what is offered to it."""
        claim = self.store.claim(self.job, 3600, self.client)
        self.store.fetch(claim.version, np.empty(self.scene.manifest.nbytes, np.uint8))
        return claim

    def payload(self, value: float = 1.0) -> Any:
        frame = Frame(self.scene.manifest)
        frame.floats.fill_(value)
        return frame.buffer

    def update(self, **fields: Any) -> Update:
        known = {"examples": EXAMPLES, "nbytes": self.scene.manifest.nbytes, "chunks": 1, "seconds": 0.5}
        return Update(**{**known, **fields})

    def post(self, value: float = 1.0, **fields: Any) -> None:
        """The update of its job, honestly."""
        self.claims.append(self.fetch())
        assert self.store.post(self.claims[-1], self.update(**fields), self.payload(value)) == ""
