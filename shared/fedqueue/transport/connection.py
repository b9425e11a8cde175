"""A Redis connection with explicit timeouts and retries, which does not copy blobs.

Every write of fedqueue is conditional or idempotent, so a command that is retried after a lost answer is safe.
"""

from __future__ import annotations

import re
import socket
import ssl
from typing import Any
from urllib.parse import unquote, urlsplit

import redis
from redis.backoff import ExponentialWithJitterBackoff
from redis.connection import (
    Connection,
    HiredisRespSerializer,
    PythonRespSerializer,
    SSLConnection,
    UnixDomainSocketConnection,
)
from redis.retry import Retry
from redis.sentinel import Sentinel, SentinelManagedConnection

from fedqueue.config.tls import Tls
from fedqueue.errors import ConfigurationError, ServerUnavailable
from fedqueue.transport.zero_copy import Receiving, ReceivingParser

SOCKET_SECONDS = 60.0  # one chunk of 32 MiB at 1 MB/s fits; blocking reads stay below
BLOCK_SECONDS = 5.0  # the longest that a read may block on the server
CONNECT_SECONDS = 5.0
RETRIES = 6  # with backoff and jitter: about 10 s of absence


class _Packer:
    """hiredis's serializer, which is quick; for a command with a blob redis-py's Python one, which does not copy it."""

    def __init__(self, for_blobs: PythonRespSerializer) -> None:
        self._quick, self._for_blobs = HiredisRespSerializer(), for_blobs

    def pack(self, *args: Any) -> list[bytes]:
        serializer = self._for_blobs if any(type(arg) is memoryview for arg in args) else self._quick
        return serializer.pack(*args)  # type: ignore[no-any-return]


class _CopyFree(Receiving):
    """A blob (a memoryview) goes out as it is, and comes in right where it is wanted."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"parser_class": ReceivingParser, **kwargs})

    def _construct_command_packer(self, packer: Any) -> Any:
        return packer or _Packer(PythonRespSerializer(self._buffer_cutoff, self.encoder.encode))  # type: ignore[attr-defined]


class TcpConnection(_CopyFree, Connection):
    pass


class TlsRefused(redis.RedisError):
    """A handshake that fails again however often it is tried. Of redis-py's tree, since any command may raise it."""


class TlsConnection(_CopyFree, SSLConnection):
    """TLS by our own context: redis-py's trusts the system's authorities even where an own CA is given."""

    def __init__(self, *args: Any, tls: Tls | None = None, **kwargs: Any) -> None:
        self._tls = tls or Tls()
        super().__init__(*args, **kwargs)

    def _wrap_socket_with_ssl(self, sock: socket.socket) -> ssl.SSLSocket:
        try:
            return self._tls.context().wrap_socket(sock, server_hostname=self.host)
        except ssl.SSLError as error:
            raise self._refused(error) from error

    def on_connect_check_health(self, check_health: bool = True) -> None:
        """As redis-py's. In TLS 1.3 a server says what it thinks of our certificate after the handshake only."""
        try:
            super().on_connect_check_health(check_health=check_health)
        except redis.ConnectionError as error:
            raise self._refused(error) from error

    def _refused(self, error: Exception) -> Exception:
        why = self._tls.explain(error)
        if why:
            return TlsRefused(why)
        if isinstance(error, redis.ConnectionError):  # its alert may have been lost, so this is a guess
            ours = "it may not accept redis.cert_file" if self._tls.cert_file else "redis.cert_file is not set"
            return redis.ConnectionError(f"{error} (where the server asks for client certificates: {ours})")
        return error


class PrimaryTcpConnection(SentinelManagedConnection, TcpConnection):
    """To whatever the sentinels say is the primary."""


class PrimaryTlsConnection(SentinelManagedConnection, TlsConnection):
    """The same; the primary's certificate has to be for the address that the sentinels give."""


class UnixConnection(_CopyFree, UnixDomainSocketConnection):
    pass


SCHEMES: dict[str, type[Connection] | type[UnixDomainSocketConnection]] = {
    "redis": TcpConnection,
    "rediss": TlsConnection,
    "unix": UnixConnection,
}
SENTINEL, TLS_SENTINEL = "sentinel", "sentinels"
TLS_SCHEMES = ("rediss", TLS_SENTINEL)
SENTINEL_PORT = 26379
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^:\[\]]*)(:\d+)?")


class Pool(redis.ConnectionPool):
    """Lends as redis-py's does, without counting each loan for telemetry and announcing it to listeners.

    That, around each command, takes as long as sending it.
    """

    def get_connection(self, command_name: object = None, *keys: object, **options: object) -> Any:
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
        self._checkpid()
        with self._lock:
            if connection not in self._in_use_connections:
                return
            if connection.pid != self.pid or connection.should_reconnect():
                super().release(connection)  # after a fork, or one that is to be replaced: rare
                return
            self._in_use_connections.remove(connection)
            self._available_connections.append(connection)


def _is_stale(connection: Any) -> bool:
    """Whether the server has closed it, or an answer is left of what was broken off."""
    try:
        return bool(connection.can_read())
    except (redis.ConnectionError, redis.TimeoutError, OSError):
        return True


class SharedRetry(Retry):
    """One for all connections of a client (redis-py copies it into each), so that all of them can be told at once."""

    def __deepcopy__(self, memo: object) -> SharedRetry:
        return self


def limit_retries(client: redis.Redis) -> None:
    """From now on a command is repeated once: the process is on its way out. Safe to call from a signal handler."""
    if retry := client.get_retry():
        retry.update_retries(min(1, retry.get_retries()))


def connect(url: str, retries: int = RETRIES, tls: Tls | None = None) -> redis.Redis:
    """A client for `redis://`, `rediss://`, `unix://`, `sentinel://` or `sentinels://`.

    Nothing is sent before its first command.

    `sentinel://[USER:PASSWORD@]HOST[:PORT][,HOST[:PORT]…]/SERVICE[/DB]` asks the sentinels who the primary is, for
    each new connection; USER and PASSWORD are the primary's. `sentinels://` speaks TLS to the sentinels and to
    the primary. `tls` goes with it and with `rediss://` only. Raises ConfigurationError for any other URL, and for
    files of `tls` that cannot be used.
    """
    scheme = _scheme(url)
    if tls and tls != Tls():
        if scheme not in TLS_SCHEMES:
            accepted = "expected rediss:// or sentinels://, since certificates are set"
            raise ConfigurationError("redis.url", f"{scheme}://…", accepted)
        tls.context()
    options: dict[str, Any] = {
        "socket_timeout": SOCKET_SECONDS,
        "socket_connect_timeout": CONNECT_SECONDS,
        "retry": SharedRetry(ExponentialWithJitterBackoff(base=0.1, cap=3.0), retries),
        "retry_on_error": [redis.ConnectionError, redis.TimeoutError],
        "driver_info": None,  # no CLIENT SETINFO: Redis 7.0 has no such thing to give a right to
    }
    if scheme in (SENTINEL, TLS_SENTINEL):
        return _connect_through_sentinels(url, options, (tls or Tls()) if scheme == TLS_SENTINEL else None)
    if scheme not in SCHEMES:
        known = ", ".join(f"{s}://" for s in (*SCHEMES, SENTINEL, TLS_SENTINEL))
        raise ConfigurationError("redis.url", scheme + "://…", f"one of {known}")
    try:
        pool = Pool.from_url(url, **options)
    except ValueError:  # its message may hold the part of the URL that is the password
        accepted = "unix://[USER:PASSWORD@]PATH" if scheme == "unix" else f"{scheme}://[USER:PASSWORD@]HOST[:PORT][/DB]"
        raise ConfigurationError("redis.url", scheme + "://…", f"expected {accepted}, specials as %XX") from None
    pool.connection_class = SCHEMES[scheme]
    if tls and scheme == "rediss":
        pool.connection_kwargs["tls"] = tls
    return redis.Redis(connection_pool=pool)


def _connect_through_sentinels(url: str, options: dict[str, Any], tls: Tls | None) -> redis.Redis:
    scheme, _, rest = url.partition("://")
    credentials, _, place = rest.rpartition("@")
    user, _, password = credentials.partition(":")
    hosts, _, path = place.partition("/")
    service, _, database = path.partition("/")
    pairs = [host.partition(":")[::2] for host in hosts.split(",")]
    if (
        not service
        or not all(host and (port or "1").isdecimal() for host, port in pairs)
        or not (database or "0").isdecimal()
    ):
        expected = f"expected {scheme}://[USER:PASSWORD@]HOST[:PORT][,…]/SERVICE[/DB]"
        raise ConfigurationError("redis.url", f"{scheme}://…", expected)
    secure: dict[str, Any] = {} if tls is None else {"tls": tls}
    sentinel = Sentinel([])  # type: ignore[no-untyped-call]
    sentinel.sentinels = [
        redis.Redis(
            connection_pool=redis.ConnectionPool(
                SCHEMES["redis" if tls is None else "rediss"], host=host, port=int(port or SENTINEL_PORT),
                socket_timeout=CONNECT_SECONDS, socket_connect_timeout=CONNECT_SECONDS, **secure,
            )
        )
        for host, port in pairs
    ]  # fmt: skip
    options |= secure | {"connection_class": PrimaryTcpConnection if tls is None else PrimaryTlsConnection}
    who = {"username": unquote(user) or None, "password": unquote(password) or None}
    client: redis.Redis = sentinel.master_for(service, db=int(database or 0), **who, **options)  # type: ignore[no-untyped-call]
    return client


def check(client: redis.Redis, url: str) -> None:
    """Raise ServerUnavailable, with the reason and without any password, unless the server answers."""
    try:
        client.ping()
    except redis.RedisError as error:
        raise ServerUnavailable(f"no Redis at {without_password(url)}: {error}") from error


def without_password(url: str) -> str:
    """The URL with its user, hosts and path only; of one in which they cannot be told apart, the scheme."""
    scheme = _scheme(url)
    try:
        parts = urlsplit(url)
    except ValueError:
        return f"{scheme}://…"
    credentials, at, hosts = parts.netloc.rpartition("@")
    if not scheme or not all(_HOST.fullmatch(host) for host in hosts.split(",")):
        return f"{scheme}://…"
    user = credentials.partition(":")[0]
    return f"{scheme}://{user + at if user else ''}{hosts}{parts.path}"


def _scheme(url: str) -> str:
    scheme, separator, _ = url.partition("://")
    return scheme if separator else ""  # all of what is no URL may be a password
