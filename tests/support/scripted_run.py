"""Runs the real coordinator over a real store, in one process with workers that follow a script.

At the step where a coordinator is to die, `Killed` is raised. As after SIGKILL, nothing more is sent to Redis.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import redis
import torch

from fedqueue.config.loading import parse_config
from fedqueue.config.schema import Config
from fedqueue.protocol.messages import Ending, Registration
from fedqueue.tensors.frame import Frame
from fedqueue.tensors.manifest import Manifest
from fedqueue.transport.worker_store import Claim, WorkerStore
from fedqueue_coordinator.core.run_summary import RunResult
from fedqueue_coordinator.service.coordinator import Coordinator
from fedqueue_coordinator.service.coordinator_store import CoordinatorStore
from tests.support.builders import EXAMPLES, make_update
from tests.support.mortal_coordinator import Killed, MortalStore, dead_after, ticking_clock
from tests.support.small_task import SmallTask

CLIENTS = ("a", "b", "c")
AHEAD = 2  # jobs that a worker claims before it posts its own, so that updates are stale


def scripted_config(**sections: Any) -> Config:
    tree = {
        "name": "scripted",
        "seed": 5,
        "task": {"entrypoint": "task.py:SmallTask"},
        "clients": {"names": list(CLIENTS), "min_available": len(CLIENTS)},
        "dispatch": {"lease_seconds": 3600, "leader_lease_seconds": 3600, "backoff_seconds": 1e-6},
        "checkpoint": {"every_seconds": "off"},
        "ledger": {"keep_payloads": True},
        "stop": {"versions": 4},
        **sections,
    }
    return parse_config(tree)


class Workers:
    """Post the updates of all jobs by job number; the content of an update depends only on that number."""

    def __init__(self, client: redis.Redis, config: Config, together: int = 1) -> None:
        """Post `together` updates before each read by the coordinator."""
        self._store, self._together = WorkerStore(client, config.name, "workers"), together
        self._claims: dict[str, Claim] = {}
        self._versions = config.stop.versions or 0
        self._manifest = Manifest.from_module(SmallTask().model())
        for name in CLIENTS:
            self._store.join([name], 3600)
            self._store.register(Registration(client=name, examples=EXAMPLES))

    def act(self) -> None:
        """Claim the jobs that are due soon and post those that are due, until the run has all its versions."""
        if self._over:
            return
        queued = sorted(
            job.decode()  # type: ignore[union-attr]
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
        """Whether all wanted versions exist; the coordinator closes the open jobs."""
        return int(self._store.redis.hget(self._store.keys.head, "version") or 0) >= self._versions

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
            frame.floats[0] = float("nan")  # so that the update is rejected
        buffer = frame.buffer
        return self._store.post(claim, make_update(buffer.nbytes, seconds=0.1), buffer)


def _next_millisecond() -> None:
    """Wait for the next millisecond, so that entries are read in the order of posting and not by client."""
    now = time.time_ns() // 1_000_000
    while time.time_ns() // 1_000_000 == now:
        pass


def lead(client: redis.Redis, workers: Workers | None, config: Config, folder: Path, at: Callable[[str], None]) -> Any:
    """Run one coordinator from taking the lead to the end of the run; raises Killed where `at` does."""
    hook = dead_after(at)
    store = MortalStore(client, config.name, f"owner-{id(object())}")
    store.at = hook
    coordinator = Coordinator(
        config, SmallTask(), store, folder, clock=ticking_clock(), sleep=lambda seconds: None, failpoint=hook
    )
    store.others = workers or Workers(client, config)
    return coordinator.run()


def result_of(coordinator: Coordinator) -> RunResult:
    """Run the coordinator to the end of its run; a pause instead of an end fails the test."""
    result = coordinator.run()
    assert result is not None, "the coordinator was paused"
    return result


def run_to_the_end(
    client: redis.Redis, config: Config, folder: Path, deaths: list[Callable[[str], None]], together: int = 1
) -> tuple[RunResult, int]:
    """Run one coordinator after another, the first ones until they are killed; return how many were killed."""
    workers = Workers(client, config, together)
    died = 0
    for at in [*deaths, lambda point: None]:
        try:
            return lead(client, workers, config, folder, at), died
        except Killed:
            died += 1
            if _state(client, config) == "ended":  # only the notification was left to do
                return _ended(CoordinatorStore(client, config.name, "reader")), died
            client.hset(f"fedqueue:{{{config.name}}}:leader", "expires", 0)  # the leader lease expires
    raise AssertionError("the last coordinator has no death")


def _state(client: redis.Redis, config: Config) -> str:
    return cast(bytes, client.hget(f"fedqueue:{{{config.name}}}:config", "state") or b"").decode()


def _ended(store: CoordinatorStore) -> RunResult:
    """Read the result from Redis, for a run that was ended by a coordinator which then died."""
    info = store.info()
    frame = Frame(Manifest.unpack(info.manifest))
    store.read_blob(store.keys.model(info.version), frame.buffer)
    return RunResult(
        info.version, frame, info.stopped_because, False, store.ledger(), store.refused(), store.job_number()
    )
