"""Takes the lead, and keeps it while this process lives, however long the main thread is at one thing."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

import redis
import structlog

from fedqueue.config import Config
from fedqueue.coordinator_store import CoordinatorStore
from fedqueue.errors import Fenced, RunExists

log = structlog.get_logger("fedqueue.coordinator")


def take_the_lead(
    store: CoordinatorStore,
    config: Config,
    has_checkpoint: Callable[[], bool],
    standby: bool,
    stopped: Callable[[], bool],
    sleep: Callable[[float], None],
) -> bool:
    """Wait for the lead; False where told to stop. Without `standby`, only as long as a dead leader holds it.

    Raises RunExists where another one leads for longer.
    """
    lease = config.dispatch.leader_seconds
    waited = 0.0
    seen = False
    while True:
        exists = store.exists()
        seen = seen or exists
        # A run that was here and is gone is for whoever has its checkpoint, not to be started from nothing.
        if (exists or not seen or has_checkpoint()) and store.lead(lease):
            return True
        if stopped():
            return False
        if not waited:
            log.info("another coordinator leads this run: waiting", run=config.name, standby=standby)
        if not standby and waited > 2 * lease:
            raise RunExists(config.name, "is led by another coordinator (--standby waits for it to end)")
        sleep(lease / 20)
        waited += lease / 20


class KeepLead:
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
