"""Starts the federation for chaos tests: a server, a proxy in front of it, coordinators, workers and any keepers."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import redis

from fedqueue.config.names import ENVIRONMENT_PREFIX
from fedqueue.transport.connection import connect
from fedqueue_coordinator.operator.access.enrolment import KEEPER, KEEPER_SITES, enroll_missing
from fedqueue_coordinator.operator.audit.audit_input import AuditInput, read_audit_input
from fedqueue_coordinator.service.coordinator_store import CoordinatorStore
from tests.support import toy_task
from tests.support.chaos.fleet import Fleet, Member
from tests.support.tcp_proxy import TcpProxy
from tests.support.tcp_server import PASSWORD, TcpServer

RUN = "chaos"
LEASE_SECONDS, LEADER_SECONDS = 2.0, 1.0
SHARES = (("client-0",), ("client-1",), ("client-2", "client-3"))
RECOVERY_SECONDS = 60.0  # without a merge for this long after a fault, the run counts as lost
TARGET = 0.9  # accuracy
CONFIG = f"""
name = "{RUN}"
seed = 7
[task]
entrypoint = "{toy_task.__file__}:ToyTask"
options = {{ batch_seconds = 0.03 }}
[clients]
count = 4
[training]
batch_size = 32
learning_rate = 0.05
[aggregation]
buffer_size = 3
[server_optimizer]
optimizer_options = {{ momentum = 0.5 }}
learning_rate = 0.5
[dispatch]
lease_seconds = {LEASE_SECONDS}
leader_lease_seconds = {LEADER_SECONDS}
[evaluation]
every_versions = 25
[checkpoint]
every_seconds = 5
[ledger]
keep_payloads = true
[stop]
versions = 1_000_000
"""


class Lost(AssertionError):
    """The run did not recover from a fault."""


class Chaos:
    """Holds the federation that faults act on. Call `tick` often: it supervises, and ends timed faults."""

    def __init__(self, folder: Path, seed: int, keepers: Sequence[str] = ()) -> None:
        self.folder, self.rng = folder, random.Random(seed)
        folder.mkdir(parents=True, exist_ok=True)
        config = folder / "federation.toml"
        password = folder / "redis.password"
        password.write_text(PASSWORD)
        security = f'[security]\nkeys = "{folder}/keys"\negress_log = "{folder}/egress"\n'
        secure = f"[secure]\nkeepers = {json.dumps(list(keepers))}\n"
        own = CONFIG.replace("{ batch_seconds", "{ buffers = false, batch_seconds") if keepers else CONFIG
        config.write_text(f'{own}[redis]\npassword_file = "{password}"\n{security}{secure}')
        enroll_missing(folder / "keys", keepers, role=KEEPER)
        enroll_missing(folder / "keys", sum(SHARES, ()), site=folder / "keys")
        self.server = TcpServer(folder / "redis")
        self.proxy = TcpProxy(self.server.port)
        self.store = CoordinatorStore(connect(self.server.url, retries=0), RUN, "spectator")
        self.fleet = Fleet(
            folder,
            config,
            self.server.address_through(self.proxy.port),
            SHARES,
            coordinators=2,
            keepers={name: folder / "keys" / KEEPER_SITES / name for name in keepers},
        )
        self._later: list[tuple[float, Callable[[], Any]]] = []
        self.accepted: list[str] = []
        """Duplicates that were not refused."""

    def later(self, seconds: float, undo: Callable[[], Any]) -> None:
        self._later.append((time.monotonic() + seconds, undo))

    @property
    def quiet(self) -> bool:
        """Whether no fault is still active."""
        return not self._later

    def tick(self) -> None:
        due = [undo for at, undo in self._later if at <= time.monotonic()]
        self._later = [(at, undo) for at, undo in self._later if at > time.monotonic()]
        for undo in due:
            undo()
        self.fleet.supervise()
        time.sleep(0.02)

    def version(self) -> int:
        """The newest version; -1 if the run or the server does not exist."""
        try:
            return int(self.store.redis.hget(self.store.keys.head, "version") or -1)
        except redis.RedisError:
            return -1

    def wait(self, condition: Callable[[], bool], what: str, seconds: float = RECOVERY_SECONDS) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                raise Lost(f"not within {seconds:.0f} s: {what}; logs in {self.folder / 'logs'}")
            self.tick()

    def audit_input(self) -> AuditInput:
        """Read what an operator's audit reads: all that the run has recorded so far."""
        variable = f"{ENVIRONMENT_PREFIX}REDIS__URL"
        os.environ[variable] = self.server.url
        try:
            return read_audit_input(self.store.run, "")
        finally:
            del os.environ[variable]

    def leader(self) -> Member | None:
        """The coordinator that holds the leader lease, or None if its process has died."""
        try:
            owner = self.store.redis.hget(self.store.keys.leader, "owner") or b""
        except redis.RedisError:
            return None
        alive = [one for one in self.fleet.coordinators if one.alive]
        return next((one for one in alive if owner == f"pid-{one.pid}".encode()), None)

    def calm(self) -> None:
        """Undo every fault, and wait until new versions are committed."""
        self.wait(lambda: self.quiet, "faults end")
        self.wait(lambda: all(one.alive for one in self.fleet.members), "all processes are back")
        reached = self.version()
        self.wait(lambda: self.version() > max(0, reached) + 2, "merges")

    def end(self) -> Path:
        """Have the leader end the run; return the folder with the run's results."""
        self.fleet.supervising = False
        self.wait(lambda: self.leader() is not None, "a coordinator leads")
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
