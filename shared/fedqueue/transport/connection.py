"""Redis clients with explicit timeouts and retries.

Retrying a command after a lost reply is safe, because every write of fedqueue is conditional or idempotent.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

import redis
from redis.backoff import ExponentialWithJitterBackoff
from redis.connection import Connection, UnixDomainSocketConnection
from redis.retry import Retry

from fedqueue.config.tls import Tls
from fedqueue.errors import ConfigurationError, ServerUnavailable
from fedqueue.exception_text import one_line
from fedqueue.transport.pool import Pool, TcpConnection, TlsConnection, UnixConnection
from fedqueue.transport.sentinel import SENTINEL, TLS_SENTINEL, connect_through_sentinels

T = TypeVar("T")

SOCKET_SECONDS = 60.0  # without a byte; longer than a blocking read
SILENT_SECONDS = 30  # after which a line is lost on which nothing is acknowledged
BLOCK_SECONDS = 5.0  # the longest that a read may block on the server
CONNECT_SECONDS = 5.0
RETRIES = 6  # with backoff and jitter: about 10 s without a server

SCHEMES: dict[str, type[Connection] | type[UnixDomainSocketConnection]] = {
    "redis": TcpConnection,
    "rediss": TlsConnection,
    "unix": UnixConnection,
}
NO_EVICTION = "set maxmemory-policy to noeviction, and maxmemory high enough"
_LOGIN_NEEDED = (
    "it wants a password, and none was given: put it into a file and name that in redis.password_file, or write it "
    "into the URL, as redis://:PASSWORD@HOST or redis://USER:PASSWORD@HOST"
)
REFUSALS = {
    "already authenticated": _LOGIN_NEEDED,
    "Authentication required": _LOGIN_NEEDED,
    "NOAUTH": _LOGIN_NEEDED,
    "invalid username-password": "the user or the password is wrong: check redis.password_file and the URL",
    "without any password configured": "it has no password: leave the password out of redis.password_file and the URL",
    "protected mode": "it is in protected mode and answers this machine only if it has a password: set one there "
    "(requirepass, or `fedqueue acl`)",
}
"""Part of a server's error → what it means."""
_CLOSED = "Connection reset by peer", "Connection closed by server"
_OF_PIPELINE = re.compile(r"Command # \d+ \(.*\) of pipeline caused error: ", re.DOTALL)
_UNKNOWN_COMMAND = re.compile(r"unknown command [`']([^`']{1,40})[`']", re.IGNORECASE)
TLS_SCHEMES = ("rediss", TLS_SENTINEL)
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^:\[\]]*)(:\d+)?")


class SharedRetry(Retry):
    """One retry policy for all connections of a client.

    redis-py deep-copies the policy into each connection; this one stays shared, so `limit_retries` reaches them all.
    A server that does not answer is waited for in silence by redis-py, for SOCKET_SECONDS at each try. This policy
    warns at the first try, in a process that has configured its logs.
    """

    _silent = False

    def __deepcopy__(self, memo: object) -> SharedRetry:
        return self

    def call_with_retry(self, do: Callable[[], T], fail: Callable[..., Any], *arguments: Any, **options: Any) -> T:
        """As in redis-py, with a warning once for each time that the server does not answer."""

        def warn_and_fail(error: Exception, *failures: int) -> None:
            if isinstance(error, redis.TimeoutError) and not self._silent and (log := _log()):
                self._silent = True
                log.warning("Redis accepts connections and does not answer: trying again", error=one_line(str(error)))
            fail(error, *failures)

        result = super().call_with_retry(do, warn_and_fail, *arguments, **options)
        if self._silent:
            self._silent = False
            if log := _log():
                log.info("Redis answers again")
        return result


def _log() -> Any:
    """The log of this module, in a process that has configured its logs; else None."""
    import structlog  # not by commands that log nothing

    return structlog.get_logger("fedqueue.transport") if structlog.is_configured() else None


def limit_retries(client: redis.Redis) -> None:
    """Retry each further command at most once, because the process is about to exit; safe in a signal handler."""
    if retry := client.get_retry():
        retry.update_retries(min(1, retry.get_retries()))


def connect(url: str, retries: int = RETRIES, tls: Tls | None = None) -> redis.Redis:
    """A client for `redis://`, `rediss://`, `unix://`, `sentinel://` or `sentinels://`.

    The client connects with its first command.

    `sentinel://[USER:PASSWORD@]HOST[:PORT][,HOST[:PORT]…]/SERVICE[/DB]` asks the sentinels for the primary at each
    new connection; USER and PASSWORD are the primary's. `sentinels://` uses TLS to the sentinels and to the primary.
    `tls` is accepted with `rediss://` and `sentinels://` only. Raises ConfigurationError for any other URL, and for
    files of `tls` that cannot be used.
    """
    scheme = _scheme(url)
    if tls and tls != Tls():
        if scheme not in TLS_SCHEMES:
            problem = "certificates are set, and this URL does not use TLS"
            raise ConfigurationError("redis.url", f"{scheme}://…", problem, "write rediss:// or sentinels://")
        tls.context()
    options: dict[str, Any] = {
        "socket_timeout": SOCKET_SECONDS,
        "socket_connect_timeout": CONNECT_SECONDS,
        "retry": SharedRetry(ExponentialWithJitterBackoff(base=0.1, cap=3.0), retries),
        "retry_on_error": [redis.ConnectionError, redis.TimeoutError],
        "driver_info": None,  # no CLIENT SETINFO: Redis 7.0 does not know it, so no ACL rule can allow it there
    }
    if scheme != "unix":
        options["socket_keepalive_options"] = keepalive()
    if scheme in (SENTINEL, TLS_SENTINEL):
        secure = (tls or Tls()) if scheme == TLS_SENTINEL else None
        return connect_through_sentinels(url, secure, options, CONNECT_SECONDS)
    if scheme not in SCHEMES:
        known = ", ".join(f"{s}://" for s in (*SCHEMES, SENTINEL, TLS_SENTINEL))
        raise ConfigurationError("redis.url", scheme + "://…", "unknown scheme", f"write one of {known}")
    try:
        pool = Pool.from_url(url, **options)
    except ValueError:  # its message may contain the password
        accepted = "unix://[USER:PASSWORD@]PATH" if scheme == "unix" else f"{scheme}://[USER:PASSWORD@]HOST[:PORT][/DB]"
        hint = "write special characters as %XX"
        raise ConfigurationError("redis.url", scheme + "://…", f"expected {accepted}", hint) from None
    pool.connection_class = SCHEMES[scheme]
    if tls and scheme == "rediss":
        pool.connection_kwargs["tls"] = tls
    return redis.Redis(connection_pool=pool)


def keepalive() -> dict[int, int]:
    """Socket options that end a connection whose peer has acknowledged nothing for SILENT_SECONDS.

    Probes find a line that is lost while this side waits for a reply, and TCP_USER_TIMEOUT (in ms) one that is lost
    while this side sends. An operating system without an option keeps its own, longer time.
    """
    probes = 3
    wanted = {
        "TCP_KEEPIDLE": SILENT_SECONDS // 2,
        "TCP_KEEPINTVL": SILENT_SECONDS // (2 * probes),
        "TCP_KEEPCNT": probes,
        "TCP_USER_TIMEOUT": SILENT_SECONDS * 1000,
    }
    return {getattr(socket, name): value for name, value in wanted.items() if hasattr(socket, name)}


def check(client: redis.Redis, url: str) -> None:
    """Raise ServerUnavailable, with the reason and without any password, if the server does not answer a PING."""
    try:
        client.ping()
    except redis.RedisError as error:
        why = refusal(error)
        if _scheme(url) == "redis" and any(part in str(error) for part in _CLOSED):
            why += " (if this port expects TLS, write rediss:// into the URL)"
        raise ServerUnavailable(f"no Redis at {without_password(url)}: {why}") from error


def refusal(error: redis.RedisError) -> str:
    """Why the server refuses a connection or does not answer, in one line, and what to do where that is known."""
    text = _OF_PIPELINE.sub("", str(error))
    for part, meaning in REFUSALS.items():
        if part in text:
            return meaning
    if unknown := _UNKNOWN_COMMAND.search(text):
        return (
            f"it has no command {one_line(unknown[1]).upper()}, which fedqueue needs: allow it there "
            "(rename-command in redis.conf, or the settings of the service), or use another server"
        )
    return one_line(text)


def eviction(client: redis.Redis) -> tuple[str, int, int]:
    """The server's maxmemory-policy if it may delete keys, its maxmemory in bytes, and how many keys it has deleted.

    An empty policy where the server deletes nothing, and where this user may not ask.
    """
    try:
        memory = client.info("memory")
        evicted = client.info("stats").get("evicted_keys", 0)
    except redis.ResponseError:
        return "", 0, 0
    policy, limit = str(memory.get("maxmemory_policy", "noeviction")), int(memory.get("maxmemory", 0))
    return ("", limit, evicted) if policy == "noeviction" or not limit else (policy, limit, evicted)


@dataclass(frozen=True)
class MemoryUse:
    """What the server says of its memory, in bytes; `limit` is its maxmemory, 0 for none."""

    used: int
    limit: int
    refused: int
    """Number of commands that it has refused since its start because its memory was full."""
    evicts_any: bool
    """Whether it may delete any key instead."""


def memory_use(client: redis.Redis) -> MemoryUse | None:
    """How full the server's memory is; None where this user may not ask. Raises RedisError where it does not answer."""
    try:
        memory, errors = client.info("memory"), client.info("errorstats")
    except redis.ResponseError:
        return None
    return MemoryUse(
        used=int(memory.get("used_memory", 0)),
        limit=int(memory.get("maxmemory", 0)),
        refused=int(errors.get("errorstat_OOM", {}).get("count", 0)),
        evicts_any=str(memory.get("maxmemory_policy", "")).startswith("allkeys"),
    )


def eviction_note(client: redis.Redis) -> str:
    """What to do where data may be missing because the server has deleted it; empty where it has deleted nothing."""
    policy, _, evicted = eviction(client)
    if not evicted or not policy:
        return ""
    return f"Redis has deleted keys to free memory (evicted_keys: {evicted}, maxmemory-policy {policy}): {NO_EVICTION}"


def without_password(url: str) -> str:
    """The URL's scheme, user, hosts and path; only its scheme if the parts cannot be told apart safely."""
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
    return scheme if separator else ""  # without "://", the whole text may be a password
