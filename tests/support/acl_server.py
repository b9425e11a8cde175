"""A real server under the access rules that `fedqueue acl` writes."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import redis

from fedqueue.protocol.keys import client_tag
from fedqueue.protocol.messages import Order
from fedqueue.transport.connection import connect
from fedqueue.transport.retry import RedisRetry
from fedqueue_coordinator.operator import child_processes
from fedqueue_coordinator.operator.access.acl import ACL_FILE, write_access
from fedqueue_coordinator.operator.embedded_server import find_server
from tests.support.redis_commands import execute
from tests.support.sample_run import SampleRun

CLIENTS = ["c0", "c1", "x-c0", "site.example.org"]
KEEPERS = ["audit", "audit-office"]


class AclServer:
    """Starts a Redis server with its own short socket folder; `urls` maps each user to its URL."""

    def __init__(
        self,
        folder: Path,
        run: str,
        clients: list[str],
        shared_worker: bool = False,
        program: str = "",
        appendonly: str = "no",
        keepers: Sequence[str] = (),
    ) -> None:
        self._socket_folder = tempfile.TemporaryDirectory(prefix="acl-")
        socket = f"{self._socket_folder.name}/s"
        self.folder = folder
        self.urls = write_access(folder / "access", run, clients, f"unix://{socket}", shared_worker, keepers)
        self._command = [
            program or find_server(), "--port", "0", "--unixsocket", socket, "--dir", str(folder), "--save", "",
            "--appendonly", appendonly, "--aclfile", str(folder / "access" / ACL_FILE),
        ]  # fmt: skip
        self._start()

    def restart(self) -> None:
        child_processes.stop([self.process])
        self._start()

    def _start(self) -> None:
        self.process = child_processes.start(self._command, self.folder / "server.log")
        RedisRetry(given_up=lambda: self.process.poll() is not None).call(self.user("admin").ping)

    def user(self, name: str) -> redis.Redis:
        return connect(self.urls[name], retries=0)

    def denied(self) -> list[str]:
        """Return the commands that the server has denied since the last call, from its ACL LOG."""
        admin = self.user("admin")
        entries = execute(admin, "ACL", "LOG")
        execute(admin, "ACL", "LOG", "RESET")
        rows = [{str(k, "utf-8"): v for k, v in entry.items()} for entry in entries]
        return [f"{row['username'].decode()}: {row['object'].decode()}" for row in rows]

    def stop(self) -> None:
        child_processes.stop([self.process])
        self._socket_folder.cleanup()


class GuardedRun(SampleRun):
    """A run led by its coordinator's Redis user, on an emptied server, with job names as in a federation."""

    def __init__(self, server: AclServer) -> None:
        server.user("admin").flushall()
        server.denied()
        super().__init__(server.user("coordinator"))
        self.coordinator.create(self.config.model_dump_json(), self.manifest, clients=CLIENTS)


def tagged(run: SampleRun, number: int, client: str) -> Order:
    """Return an order whose job has the tag of its client."""
    order = run.order(number, client)
    job = f"{order.job}-{client_tag(run.name, client)}"
    return order.model_copy(update={"job": job})
