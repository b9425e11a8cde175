"""Acquires the leader lease and renews it from a background thread."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

import redis
import structlog

from fedqueue.config.schema import Config
from fedqueue.errors import Fenced, RunExists, RunLost
from fedqueue.transport.connection import eviction_note
from fedqueue_coordinator.service.coordinator_store import CoordinatorStore

log = structlog.get_logger("fedqueue.coordinator")

RUN_LOST = "run missing from Redis and no local checkpoint found"


def acquire_leadership(
    store: CoordinatorStore,
    config: Config,
    checkpoint: Path,
    known: bool,
    standby: bool,
    stopped: Callable[[], bool],
    sleep: Callable[[float], None],
) -> bool:
    """Wait for the leader lease; False once `stopped` returns true. Without `standby`, wait no longer than two leases.

    `known`: this process has led the run before. If a run that was seen in Redis is gone, only a coordinator with its
    `checkpoint` may continue it; it must not start from version 0. The last leader has the newest checkpoint, so a
    standby that finds no run gives other coordinators one lease to come first. Raises RunExists if another coordinator
    keeps the lease, and RunLost if the run is gone and `checkpoint` does not exist.
    """
    lease = config.dispatch.leader_lease_seconds
    waited, missing, said = 0.0, 0.0, ""  # missing: seconds for which Redis has not had the run
    led_last = known

    def why_not() -> str:
        nonlocal known, missing
        exists = store.exists()
        known = known or exists
        if exists:
            missing = 0.0
            return ""
        yields = standby and not led_last and missing < lease
        if checkpoint.exists():
            return "its last leader may have a newer checkpoint" if yields else ""
        if known:
            return RUN_LOST
        return "no coordinator has started it" if yields else ""

    while True:
        why = why_not()
        if not why and store.lead(lease):
            if not why_not():  # Redis may have lost the run in the meantime
                return True
            store.release_lead()
        if stopped():
            return False
        if not standby and waited > 2 * lease:
            if why == RUN_LOST:
                raise RunLost(config.name, checkpoint, eviction_note(store.redis))
            hint = "choose another name (the key `name`), or start `fedqueue coordinator --standby`, which takes over"
            raise RunExists(config.name, "is led by another coordinator", hint)
        if not why and store.exists():
            led_last = False
        if (why := why or "another coordinator leads it") != said:
            log.info("waiting to lead this run", why=why, run=config.name, standby=standby)
            said = why
        sleep(lease / 20)
        waited, missing = waited + lease / 20, missing + lease / 20


class LeaseRenewal:
    """Renews the lease three times in `seconds` from a background thread, while this process runs.

    Without it the lease would end during a long evaluation, or while a large version is sent over a slow network. If
    another coordinator leads, the thread ends; the main thread gets Fenced from its own next write.
    """

    def __init__(self, renew: Callable[[float], None], seconds: float) -> None:
        self._renew, self._seconds = renew, seconds
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lead", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop renewing. The thread is not joined: it may wait for Redis, and a late renewal has no effect."""
        self._done.set()

    def _run(self) -> None:
        while not self._done.wait(self._seconds / 3):
            try:
                self._renew(self._seconds)
            except redis.RedisError:  # the main thread sees and logs the outage too
                continue
            except Fenced:
                return
