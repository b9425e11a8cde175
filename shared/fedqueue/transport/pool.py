"""Connections that send and receive blobs without copying them, and the pool that keeps them."""

from __future__ import annotations

import socket
import ssl
from typing import Any

import redis
from redis.connection import (
    Connection,
    HiredisRespSerializer,
    PythonRespSerializer,
    SSLConnection,
    UnixDomainSocketConnection,
)

from fedqueue.config.tls import Tls
from fedqueue.transport.zero_copy import Receiving, ReceivingParser


class _Packer:
    """hiredis's serializer, which is fast, or for a command with a memoryview redis-py's, which does not copy it."""

    def __init__(self, for_blobs: PythonRespSerializer) -> None:
        self._fast, self._for_blobs = HiredisRespSerializer(), for_blobs

    def pack(self, *args: Any) -> list[bytes]:
        serializer = self._for_blobs if any(type(arg) is memoryview for arg in args) else self._fast
        return serializer.pack(*args)  # type: ignore[no-any-return]


class _CopyFree(Receiving):
    """Mixin for redis-py's connections: sends a memoryview without a copy, and receives a blob into its buffer."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"parser_class": ReceivingParser, **kwargs})

    def _construct_command_packer(self, packer: Any) -> Any:
        return packer or _Packer(PythonRespSerializer(self._buffer_cutoff, self.encoder.encode))  # type: ignore[attr-defined]

    def connect(self) -> None:
        """Connect, unless connected: redis-py finds that out only behind its retries, before each command."""
        if self._sock is None:  # type: ignore[attr-defined]
            super().connect()  # type: ignore[misc]


class TcpConnection(_CopyFree, Connection):
    """The connection for `redis://`."""


class UnixConnection(_CopyFree, UnixDomainSocketConnection):
    """The connection for `unix://`."""


class TlsRefused(redis.RedisError):
    """A TLS handshake that no retry can repair.

    It belongs to redis-py's error tree, because any command may raise it.
    """


class TlsConnection(_CopyFree, SSLConnection):
    """The connection for `rediss://`, with our own TLS context.

    redis-py's context also trusts the system's CAs when a CA file is given.
    """

    def __init__(self, *args: Any, tls: Tls | None = None, **kwargs: Any) -> None:
        self._tls = tls or Tls()
        super().__init__(*args, **kwargs)

    def _wrap_socket_with_ssl(self, sock: socket.socket) -> ssl.SSLSocket:
        sock.settimeout(self.socket_connect_timeout)  # a server without TLS waits for the end of a line
        try:
            secure = self._tls.context().wrap_socket(sock, server_hostname=self.host)
        except TimeoutError as error:
            raise redis.TimeoutError(
                "the server does not answer the TLS handshake: is it redis:// instead of rediss://?"
            ) from error
        except ssl.SSLError as error:
            raise self._explained(error) from error
        secure.settimeout(self.socket_timeout)
        return secure

    def on_connect_check_health(self, check_health: bool = True) -> None:
        """redis-py's, with an explained error: a TLS 1.3 server rejects a client certificate after the handshake."""
        try:
            super().on_connect_check_health(check_health=check_health)
        except redis.ConnectionError as error:
            raise self._explained(error) from error

    def _explained(self, error: Exception) -> Exception:
        why = self._tls.explain(error)
        if why:
            return TlsRefused(why)
        if isinstance(error, redis.ConnectionError):  # the server's TLS alert may have been lost, so this is a guess
            ours = "it may not accept redis.cert_file" if self._tls.cert_file else "redis.cert_file is not set"
            return redis.ConnectionError(f"{error} (if the server requires client certificates: {ours})")
        return error


class Pool(redis.ConnectionPool):
    """redis-py's pool without its telemetry and its events at each checkout, which take as long as a command."""

    def get_connection(self, command_name: object = None, *keys: object, **options: object) -> Any:
        """Check out a connection that is connected and has no unread reply."""
        self._checkpid()
        with self._lock:
            connection = self._available_connections.pop() if self._available_connections else self.make_connection()
            self._in_use_connections.add(connection)
        try:
            connection.connect()
            if _is_stale(connection):
                connection.disconnect()
                connection.connect()
        except BaseException:
            self.release(connection)
            raise
        return connection

    def release(self, connection: Any) -> None:
        """Return a connection to the pool; releasing it twice has no effect."""
        self._checkpid()
        with self._lock:
            if connection not in self._in_use_connections:
                return
            if connection.pid != self.pid or connection.should_reconnect():
                super().release(connection)  # rare: after a fork, or if the connection has to be replaced
                return
            self._in_use_connections.remove(connection)
            self._available_connections.append(connection)


def _is_stale(connection: Any) -> bool:
    """Whether the server has closed the connection, or a reply to an aborted command is still unread."""
    try:
        return bool(connection.can_read())
    except (redis.ConnectionError, redis.TimeoutError, OSError):
        return True
