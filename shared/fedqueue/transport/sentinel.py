"""Redis Sentinel: URLs that name several sentinels, and connections to the primary that the sentinels report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

import redis
from redis.sentinel import Sentinel, SentinelManagedConnection

from fedqueue.config.tls import Tls
from fedqueue.errors import ConfigurationError
from fedqueue.transport.pool import TcpConnection, TlsConnection

SENTINEL, TLS_SENTINEL = "sentinel", "sentinels"
SENTINEL_PORT = 26379


class PrimaryTcpConnection(SentinelManagedConnection, TcpConnection):
    """The connection for `sentinel://`: each new connection asks the sentinels for the primary's address."""


class PrimaryTlsConnection(SentinelManagedConnection, TlsConnection):
    """The connection for `sentinels://`.

    The primary's certificate must be valid for the address that the sentinels report.
    """


@dataclass(frozen=True)
class SentinelUrl:
    """`sentinel://[USER:PASSWORD@]HOST[:PORT][,HOST[:PORT]…]/SERVICE[/DB]`, taken apart."""

    sentinels: tuple[tuple[str, int], ...]
    service: str
    database: int
    username: str | None
    password: str | None


def parse_sentinel_url(url: str) -> SentinelUrl:
    """Raises ConfigurationError, without any part of the URL but its scheme, if the URL is malformed."""
    scheme, _, rest = url.partition("://")
    credentials, _, address = rest.rpartition("@")
    user, _, password = credentials.partition(":")
    hosts, _, path = address.partition("/")
    service, _, database = path.partition("/")
    pairs = [host.partition(":")[::2] for host in hosts.split(",")]
    if (
        not service
        or not all(host and (port or "1").isdecimal() for host, port in pairs)
        or not (database or "0").isdecimal()
    ):
        hint = f"write {scheme}://[USER:PASSWORD@]HOST[:PORT][,…]/SERVICE[/DB]"
        raise ConfigurationError("redis.url", f"{scheme}://…", "not a valid URL", hint)
    return SentinelUrl(
        sentinels=tuple((host, int(port or SENTINEL_PORT)) for host, port in pairs),
        service=service,
        database=int(database or 0),
        username=unquote(user) or None,
        password=unquote(password) or None,
    )


def connect_through_sentinels(
    url: str, tls: Tls | None, options: dict[str, Any], sentinel_seconds: float
) -> redis.Redis:
    """A client of the primary, with `options` for its connections.

    `tls` None means plain TCP to the sentinels and to the primary. A sentinel has `sentinel_seconds` to connect and
    to reply.
    """
    parsed = parse_sentinel_url(url)
    secure: dict[str, Any] = {} if tls is None else {"tls": tls}
    sentinel = Sentinel([])  # type: ignore[no-untyped-call]
    sentinel.sentinels = [
        redis.Redis(
            connection_pool=redis.ConnectionPool(
                TcpConnection if tls is None else TlsConnection, host=host, port=port,
                socket_timeout=sentinel_seconds, socket_connect_timeout=sentinel_seconds, **secure,
            )
        )
        for host, port in parsed.sentinels
    ]  # fmt: skip
    client: redis.Redis = sentinel.master_for(  # type: ignore[no-untyped-call]
        parsed.service, db=parsed.database, username=parsed.username, password=parsed.password,
        connection_class=PrimaryTcpConnection if tls is None else PrimaryTlsConnection, **options, **secure,
    )  # fmt: skip
    return client
