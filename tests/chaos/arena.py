"""A federation under chaos: a server, a proxy in front of it, coordinators and workers, and what is done to them."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import redis
from fleet import Fleet, Member
from tcp_proxy import TcpProxy
from tcp_server import PASSWORD, TcpServer

from fedqueue.config.sections import ENVIRONMENT_PREFIX
from fedqueue.transport.connection import connect
from fedqueue_coordinator.operator.access.enrolment import enroll_missing
from fedqueue_coordinator.operator.audit.audit import AuditInput, read_audit_input
from fedqueue_coordinator.service.coordinator_store import CoordinatorStore

RUN = "chaos"
LEASE_SECONDS, LEADER_SECONDS = 2.0, 1.0
SHARES = (("client-0",), ("client-1",), ("client-2", "client-3"))
RECOVERY_SECONDS = 60.0  # without a merge for so long after a fault the run counts as lost
TARGET = 0.9  # accuracy
CONFIG = f"""
name = "{RUN}"
seed = 7
[task]
entrypoint = "{Path(__file__).parent / "points_task.py"}:PointsTask"
options = {{ batch_seconds = 0.03 }}
[clients]
count = 4
[training]
batch_size = 32
learning_rate = 0.05
[aggregation]
buffer_size = 3
[server_optimizer]
options = {{ momentum = 0.5 }}
learning_rate = 0.5
[dispatch]
lease_seconds = {LEASE_SECONDS}
leader_seconds = {LEADER_SECONDS}
[evaluation]
every = 25
[checkpoint]
seconds = 5
[ledger]
keep_payloads = true
[stop]
versions = 1_000_000
"""


class Lost(AssertionError):
    """The run did not recover."""


class Chaos:
    """What the faults act on. `tick` is to be called often: it supervises, and undoes faults that last a while."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.rng = folder, random.Random(seed)
        folder.mkdir(parents=True, exist_ok=True)
        config = folder / "federation.toml"
        password = folder / "redis.password"
        password.write_text(PASSWORD)
        security = f'[security]\nkeys = "{folder}/keys"\noutbox = "{folder}/outbox"\n'
        config.write_text(f'{CONFIG}[redis]\npassword_file = "{password}"\n{security}')
        enroll_missing(folder / "keys", sum(SHARES, ()), site=folder / "keys")
        self.server = TcpServer(folder / "redis")
        self.proxy = TcpProxy(self.server.port)
        self.store = CoordinatorStore(connect(self.server.url, retries=0), RUN, "spectator")
        self.fleet = Fleet(folder, config, self.server.address_through(self.proxy.port), SHARES, coordinators=2)
        self._later: list[tuple[float, Callable[[], Any]]] = []
        self.accepted: list[str] = []
        """Duplicates that were not refused."""

    def later(self, seconds: float, undo: Callable[[], Any]) -> None:
        self._later.append((time.monotonic() + seconds, undo))

    @property
    def quiet(self) -> bool:
        """Whether no fault lasts any more."""
        return not self._later

    def tick(self) -> None:
        due = [undo for at, undo in self._later if at <= time.monotonic()]
        self._later = [(at, undo) for at, undo in self._later if at > time.monotonic()]
        for undo in due:
            undo()
        self.fleet.supervise()
        time.sleep(0.02)

    def version(self) -> int:
        """The head's; -1 where there is none, or no server."""
        try:
            return int(self.store.redis.hget(self.store.keys.head, "version") or -1)  # type: ignore[arg-type]
        except redis.RedisError:
            return -1

    def wait(self, condition: Callable[[], bool], what: str, seconds: float = RECOVERY_SECONDS) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                raise Lost(f"not within {seconds:.0f} s: {what}; logs in {self.folder / 'logs'}")
            self.tick()

    def audit_input(self) -> AuditInput:
        """What the run has written down so far, read as an operator would have it read."""
        variable = f"{ENVIRONMENT_PREFIX}REDIS__URL"
        os.environ[variable] = self.server.url
        try:
            return read_audit_input(self.store.run, "")
        finally:
            del os.environ[variable]

    def leader(self) -> Member | None:
        """The coordinator that holds the lead, if it lives."""
        try:
            owner = self.store.redis.hget(self.store.keys.leader, "owner") or b""
        except redis.RedisError:
            return None
        alive = [one for one in self.fleet.coordinators if one.alive]
        return next((one for one in alive if owner == f"pid-{one.pid}".encode()), None)  # type: ignore[comparison-overlap]

    def calm(self) -> None:
        """Undo every fault, and wait until the run goes on."""
        self.wait(lambda: self.quiet, "faults end")
        self.wait(lambda: all(one.alive for one in self.fleet.members), "all processes are back")
        reached = self.version()
        self.wait(lambda: self.version() > max(0, reached) + 2, "merges")

    def end(self) -> Path:
        """Have the leader end the run; returns the folder of its results."""
        self.fleet.supervising = False
        self.wait(lambda: self.leader() is not None, "somebody leads")
        leader = self.leader()
        assert leader is not None
        leader.send(signal.SIGINT)
        assert leader.process is not None
        self.wait(lambda: not leader.alive, "the leader ends the run")
        if leader.process.exitcode != 130:
            raise Lost(f"the leader ended with {leader.process.exitcode}: {leader.log.read_text()[-500:]}")
        return Path(leader.arguments[leader.arguments.index("--output") + 1])

    def close(self) -> None:
        self.fleet.kill()
        self.proxy.stop()
        self.store.redis.close()
        self.server.kill()
