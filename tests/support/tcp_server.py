"""A real Redis server on a loopback port, with a password and every write on disk; tests kill and restart it."""

from __future__ import annotations

import socket
import subprocess
import time
from pathlib import Path

import redis

from fedqueue.logs import last_line
from fedqueue_coordinator.operator import child_processes
from fedqueue_coordinator.operator.embedded_server import find_server

PASSWORD = "swordfish"
START_SECONDS = 20.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class TcpServer:
    """Keeps its data after a kill: `start` after `kill` restarts the server on the same append-only file."""

    def __init__(self, folder: Path, **options: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.port = folder, free_port()
        self._options = {
            "port": str(self.port), "bind": "127.0.0.1", "dir": str(folder.resolve()), "requirepass": PASSWORD,
            "masterauth": PASSWORD, "appendonly": "yes", "appendfsync": "always", "save": "", "daemonize": "no",
            "repl-diskless-sync-delay": "0", **options,
        }  # fmt: skip
        self.process: subprocess.Popen[bytes]
        self.start()

    @property
    def url(self) -> str:
        return self.url_through(self.port)

    def url_through(self, port: int) -> str:
        """Return the URL of a proxy that forwards `port` to this server."""
        return f"redis://:{PASSWORD}@127.0.0.1:{port}"

    @staticmethod
    def address_through(port: int) -> str:
        """Return the proxy's URL without the password, which must not be in a command line."""
        return f"redis://127.0.0.1:{port}"

    def client(self) -> redis.Redis:
        return redis.Redis(port=self.port, password=PASSWORD)

    def start(self) -> None:
        arguments = [word for key, value in self._options.items() for word in (f"--{key}", value)]
        self.process = child_processes.start([find_server(), *arguments], self.folder / "server.log")
        deadline = time.monotonic() + START_SECONDS
        with self.client() as client:
            while True:
                try:
                    client.ping()
                    return
                except redis.RedisError:
                    assert self.process.poll() is None, last_line(self.folder / "server.log")
                    assert time.monotonic() < deadline, "the server does not answer"
                time.sleep(0.02)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        child_processes.stop([self.process])
