"""A run in one process: the real coordinator over a real store, and workers that follow a script.

Whoever is asked to die at some step raises `Killed` there, and is as dead as after SIGKILL: nothing that it says
reaches Redis any more.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import redis
import torch
from crash_points import StoreWithPoints

from fedqueue import Client, Task
from fedqueue.config.loading import Config, parse_config
from fedqueue.protocol.messages import Ending, Registration, Update
from fedqueue.protocol.stream_entry import StreamEntry
from fedqueue.tensors.frame import Frame, Manifest
from fedqueue.transport.worker_store import Claim, WorkerStore
from fedqueue_coordinator.service.coordinator import Coordinator, RunResult
from fedqueue_coordinator.service.coordinator_store import CoordinatorStore

CLIENTS = ("a", "b", "c")
AHEAD = 2  # a worker claims its job so many posts before its own, so that updates are stale
EXAMPLES = 10


class Killed(BaseException):
    """SIGKILL, within one process."""


class SmallTask(Task):
    def model(self) -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))

    def train_data(self, client: Client) -> Any:
        raise AssertionError("the workers follow a script")


def make_config(**sections: Any) -> Config:
    tree = {
        "name": "scripted",
        "seed": 5,
        "task": {"entrypoint": "task.py:SmallTask"},
        "clients": {"names": list(CLIENTS), "minimum": len(CLIENTS)},
        "dispatch": {"lease_seconds": 3600, "leader_seconds": 3600, "backoff_seconds": 1e-6},
        "checkpoint": {"seconds": 0},
        "ledger": {"keep_payloads": True},
        "stop": {"versions": 4},
        **sections,
    }
    return parse_config(tree)


class Workers:
    """Post the updates of all jobs in the order of their numbers: what a job posts depends on its number alone."""

    def __init__(self, client: redis.Redis, config: Config, together: int = 1) -> None:
        """`together` updates are posted before the coordinator looks."""
        self._store, self._together = WorkerStore(client, config.name, "workers"), together
        self._claims: dict[str, Claim] = {}
        self._versions = config.stop.versions
        self._manifest = Manifest.from_module(SmallTask().model())
        for name in CLIENTS:
            self._store.join([name], 3600)
            self._store.register(Registration(client=name, examples=EXAMPLES))

    def act(self) -> None:
        """Claim the jobs whose turn comes soon, and post those whose turn it is. When the run ends, nobody acts."""
        if self._over:
            return
        queued = sorted(
            job.decode()
            for name in CLIENTS
            for job in self._store.redis.lrange(f"rq:queue:{self._store.keys.queue(name)}", 0, -1)
        )
        for job in queued:
            if job not in self._claims and len(self._claims) <= AHEAD:
                self._claims[job] = self._store.claim(job, 3600)
        for job in sorted(self._claims)[: self._together]:
            claim = self._claims.pop(job)
            _next_millisecond()
            refused = self._post(claim, int(job.split("-")[-2]))
            assert refused == "", refused
            for name in CLIENTS:
                self._store.redis.lrem(f"rq:queue:{self._store.keys.queue(name)}", 0, job)
            self._store.redis.delete(f"rq:job:{job}")

    @property
    def _over(self) -> bool:
        """As many versions as are wanted: the coordinator closes what is open."""
        return int(self._store.redis.hget(self._store.keys.head, "version") or 0) >= self._versions  # type: ignore[arg-type]

    def _post(self, claim: Claim, number: int) -> str:
        if number % 7 == 3:
            return self._store.end(claim, Ending(reason="returned"))
        if number % 7 == 5:
            return self._store.end(claim, Ending(reason="failed", error="ValueError: by script"))
        frame = Frame(self._manifest)
        rng = np.random.default_rng(number)
        frame.floats.copy_(torch.from_numpy(rng.normal(size=self._manifest.floats).astype(np.float32)))
        frame.buffers.abs_()
        frame.counters.fill_(number)
        if number % 7 == 6:
            frame.floats[0] = float("nan")  # is rejected
        buffer = frame.buffer
        return self._store.post(claim, Update(examples=EXAMPLES, nbytes=buffer.nbytes, chunks=1, seconds=0.1), buffer)


def _next_millisecond() -> None:
    """Entries of one millisecond are read in the order of their clients, and runs may differ in whose job it is."""
    now = time.time_ns() // 1_000_000
    while time.time_ns() // 1_000_000 == now:
        pass


class Mortal(StoreWithPoints):
    """The coordinator's store. Before the coordinator waits for entries, the workers act."""

    workers: Workers

    def receive(self, block_seconds: float, count: int = 32) -> list[StreamEntry]:
        self.workers.act()
        self.at("before receive")
        return super().receive(0.001, count)


def lead(client: redis.Redis, workers: Workers | None, config: Config, folder: Path, at: Callable[[str], None]) -> Any:
    """One coordinator, from taking the lead to the end of the run; raises Killed where `at` does."""
    dead = False

    def hook(point: str) -> None:
        nonlocal dead
        if dead:
            raise Killed(point)
        try:
            at(point)
        except Killed:
            dead = True
            raise

    store = Mortal(client, config.name, f"owner-{id(object())}")
    store.at = hook  # type: ignore[method-assign]
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += 1.0  # so that a rest is over by the next tick
        return now

    coordinator = Coordinator(
        config, SmallTask(), store, folder, clock=clock, sleep=lambda seconds: None, failpoint=hook
    )
    store.workers = workers or Workers(client, config)
    return coordinator.run()


def run_to_the_end(
    client: redis.Redis, config: Config, folder: Path, deaths: list[Callable[[str], None]], together: int = 1
) -> tuple[RunResult, int]:
    """Coordinators one after another, the first ones with a death of their own; returns how many of them died."""
    workers = Workers(client, config, together)
    died = 0
    for at in [*deaths, lambda point: None]:
        try:
            return lead(client, workers, config, folder, at), died
        except Killed:
            died += 1
            if _state(client, config) == "ended":  # nothing was left to do but to tell
                return _ended(CoordinatorStore(client, config.name, "reader")), died
            client.hset(f"fedqueue:{{{config.name}}}:leader", "expires", 0)  # its lease runs out
    raise AssertionError("the last coordinator has no death")


def _state(client: redis.Redis, config: Config) -> str:
    return (client.hget(f"fedqueue:{{{config.name}}}:config", "state") or b"").decode()  # type: ignore[union-attr]


def _ended(store: CoordinatorStore) -> RunResult:
    """What Redis keeps of a run whose coordinator died after it had ended it."""
    info = store.info()
    frame = Frame(Manifest.unpack(info.manifest))
    store.read_blob(store.keys.model(info.version), frame.buffer)
    return RunResult(
        info.version, frame, info.stopped_because, False, store.ledger(), store.refused(), store.job_number()
    )
