"""A signed federation in one process with an attacker who controls Redis; coordinator, sites and keys are real."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import redis

from fedqueue.config.loading import parse_config
from fedqueue.protocol.coordinator_identity import CoordinatorIdentity, load_coordinator_identity
from fedqueue.protocol.keys import Keys
from fedqueue.protocol.messages import Registration, Update
from fedqueue.protocol.site_identity import SiteIdentity, load_site_identity
from fedqueue.protocol.stream_entry import StreamEntry
from fedqueue.tensors.codec import Codec
from fedqueue.tensors.manifest import Manifest
from fedqueue.transport.store import Store
from fedqueue.transport.worker_store import Claim, WorkerStore
from fedqueue_coordinator.operator.access.enrolment import enroll_missing
from fedqueue_coordinator.service.coordinator import Coordinator
from fedqueue_coordinator.service.coordinator_store import CoordinatorStore, new_owner
from tests.support.builders import EXAMPLES, constant_frame, make_update
from tests.support.redis_commands import stored_field
from tests.support.sample_run import Buffer
from tests.support.small_task import SmallTask

RUN = "scene"


class ScriptedStore(CoordinatorStore):
    """Executes one step of the script before each read of the stream; after the last, the coordinator leaves."""

    steps: list[Callable[[], object]]
    leave: Callable[[], None]

    def receive(self, block_seconds: float, count: int = 32) -> list[StreamEntry]:
        if self.steps:
            self.steps.pop(0)()
        else:
            self.leave()
        return super().sweep(count)  # a forged entry may come without a wakeup


class Scene:
    """Enrolls clients c0 and c1; FedAsync adds each delta unscaled, so every update makes a version."""

    def __init__(self, client: redis.Redis, folder: Path, signed: bool = True, **sections: Any) -> None:
        self.redis, self.folder, self.signed = client, folder, signed
        self.keys, self.key_folder = Keys(RUN), folder / "keys"
        self.task = SmallTask(batch_norm=False)
        self.manifest = Manifest.from_module(self.task.model())
        self.config = parse_config(
            {
                "name": RUN,
                "task": {"entrypoint": "task.py:SmallTask"},
                "clients": {"names": ["c0", "c1"]},
                "aggregation": {
                    "strategy": "fedasync", "alpha": 1.0, "mixing": "delta", "staleness": {"function": "constant"},
                },
                "server_optimizer": {"optimizer_options": {"momentum": 0.5}},
                "dispatch": {"lease_seconds": 3600, "leader_lease_seconds": 3600, "backoff_seconds": 1e-6},
                "checkpoint": {"every_seconds": "off"},
                "stop": {"versions": 1000},
                **sections,
            }
        )  # fmt: skip
        enroll_missing(self.key_folder, ["c0", "c1"])
        self.coordinator: Coordinator

    def identity(self) -> CoordinatorIdentity:
        return load_coordinator_identity(self.key_folder, RUN)

    def play(self, *steps: Callable[[], object]) -> Coordinator:
        """Let a coordinator lead while the steps are executed in order, and then leave the run without ending it."""
        store = ScriptedStore(self.redis, RUN, new_owner(), self.identity() if self.signed else None)
        now = 0.0

        def clock() -> float:
            nonlocal now
            now += 1.0
            return now

        self.coordinator = Coordinator(
            self.config, self.task, store, self.folder, clock=clock, sleep=lambda seconds: None
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
        """Return the reasons of all jobs that ended without a merge and of all refused entries, in order."""
        return [r["reason"] for r in self.store.ledger() if r["kind"] in ("rejected", "abandoned")]

    @property
    def version(self) -> int:
        return self.store.info().version

    def model(self) -> bytes:
        return self.store.read_model(self.version, Codec(self.manifest)).buffer.tobytes()

    def entries(self, client: str = "c0") -> list[tuple[bytes, dict[bytes, bytes]]]:
        return self.redis.xrange(self.keys.updates(client))  # type: ignore[return-value]

    def snapshot(self) -> dict[bytes, bytes]:
        """Return a copy of everything in Redis, as an attacker would take it."""
        return {key: self.redis.dump(key) for key in self.redis.scan_iter()}  # type: ignore[misc]

    def roll_back(self, snapshot: dict[bytes, bytes]) -> None:
        self.redis.flushall()
        for key, value in snapshot.items():
            self.redis.restore(key, 0, value)


class Site:
    """One client's worker, without the training."""

    def __init__(self, scene: Scene, client: str, session: str, folder: Path) -> None:
        self.scene, self.client = scene, client
        self._identity = load_site_identity(folder, RUN, session) if scene.signed else None
        self.store = WorkerStore(scene.redis, RUN, session, self._identity)
        self.claims: list[Claim] = []

    @property
    def identity(self) -> SiteIdentity:
        """The site's identity, in a scene with signatures."""
        assert self._identity is not None
        return self._identity

    def join(self, examples: int = EXAMPLES) -> None:
        if self._identity:
            self.identity.enter(self.store.info())
        assert self.store.join([self.client], 3600) == self.client
        assert self.store.register(Registration(client=self.client, examples=examples))

    def leave(self) -> None:
        self.store.leave([self.client])

    @property
    def job(self) -> str:
        """The job that waits for this site."""
        record = self.scene.redis.hget(self.scene.keys.site(self.client), "job")
        return record.decode() if record else ""  # type: ignore[union-attr]

    def order(self) -> bytes:
        return stored_field(self.scene.redis, self.scene.keys.job(self.job), "order")

    def fetch(self) -> Claim:
        """Claim the job, and fetch the model that is offered."""
        claim = self.store.claim(self.job, 3600, self.client)
        self.store.fetch(claim.version, np.empty(self.scene.manifest.nbytes, np.uint8))
        return claim

    def payload(self, value: float = 1.0) -> Buffer:
        """Make an update's bytes with `value` in all floats."""
        return constant_frame(self.scene.manifest, value).buffer

    def update(self, **fields: Any) -> Update:
        """Make the header of an update of the scene's model."""
        return make_update(**{"nbytes": self.scene.manifest.nbytes, "chunks": 1, **fields})

    def post(self, value: float = 1.0, **fields: Any) -> None:
        """Post a valid update of the site's job."""
        self.claims.append(self.fetch())
        assert self.store.post(self.claims[-1], self.update(**fields), self.payload(value)) == ""
