"""Takes the lead, and keeps it while this process lives, however long the main thread is at one thing."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

import redis
import structlog

from fedqueue.config.loading import Config
from fedqueue.errors import Fenced, RunExists, RunLost
from fedqueue_coordinator.service.coordinator_store import CoordinatorStore

log = structlog.get_logger("fedqueue.coordinator")

RUN_LOST = "Redis has lost it, and its checkpoint is not here"


def acquire_leadership(
    store: CoordinatorStore,
    config: Config,
    checkpoint: Path,
    known: bool,
    standby: bool,
    stopped: Callable[[], bool],
    sleep: Callable[[float], None],
) -> bool:
    """Wait for the lead; False where told to stop. Without `standby`, only as long as a dead leader holds it.

    `known`: this process has seen the run in Redis before. A run that was there and is gone is for whoever has its
    `checkpoint`, not to be started from nothing; so a standby that finds nothing leaves others the time to come first.
    Raises RunExists where another one leads for longer, and RunLost where nobody does and there is no checkpoint.
    """
    lease = config.dispatch.leader_seconds
    waited, said = 0.0, ""

    def why_not() -> str:
        nonlocal known
        exists = store.exists()
        known = known or exists
        if exists or checkpoint.exists():
            return ""
        if known:
            return RUN_LOST
        return "nobody has started it" if standby and waited < lease else ""

    while True:
        why = why_not()
        if not why and store.lead(lease):
            if not why_not():  # Redis may have lost it between the two
                return True
            store.release_lead()
        if stopped():
            return False
        if not standby and waited > 2 * lease:
            if why == RUN_LOST:
                raise RunLost(config.name, checkpoint)
            raise RunExists(config.name, "is led by another coordinator (--standby waits for it to end)")
        if (why := why or "another coordinator leads it") != said:
            log.info("waiting to lead this run", why=why, run=config.name, standby=standby)
            said = why
        sleep(lease / 20)
        waited += lease / 20


class LeaseRenewal:
    """Renews three times in `seconds` on a thread of its own; a stopped or dead process renews nothing.

    Without it a last evaluation, or a large version on a slow network, would hand the lead to a standby half-way.
    Where another one leads by now the thread ends: the main thread learns it from its own next write.
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
        """Not joined: it may be in the middle of an outage, and a renewal after the release changes nothing."""
        self._done.set()

    def _run(self) -> None:
        while not self._done.wait(self._seconds / 3):
            try:
                self._renew(self._seconds)
            except redis.RedisError:  # the main thread sees the outage too, and says so
                continue
            except Fenced:
                return
