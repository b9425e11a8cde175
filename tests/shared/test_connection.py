"""Connections: accepted URLs, timeouts, and passwords that no error shows."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import redis
import redis.connection
from hypothesis import given
from hypothesis import strategies as st
from redis.sentinel import SentinelConnectionPool

from fedqueue.config.tls import Tls
from fedqueue.errors import ConfigurationError, FedqueueError, ServerUnavailable
from fedqueue.transport import connection, pool, sentinel
from fedqueue.transport.connection import BLOCK_SECONDS, SOCKET_SECONDS, check, connect, limit_retries, without_password

SECRET = "hunter2"


@pytest.mark.parametrize(
    ("url", "cls", "settings"),
    [
        ("redis://host:1234/2", pool.TcpConnection, {"host": "host", "port": 1234, "db": 2}),
        ("rediss://u:p@host", pool.TlsConnection, {"host": "host", "username": "u", "password": "p"}),
        ("unix:///tmp/r.sock?db=1", pool.UnixConnection, {"path": "/tmp/r.sock", "db": 1}),
        ("redis://:p%40ss%3Aword@host", pool.TcpConnection, {"password": "p@ss:word"}),
    ],
)
def test_creating_a_client_sends_nothing(url: str, cls: type[Any], settings: dict[str, Any]) -> None:
    pool = connect(url).connection_pool
    assert pool.connection_class is cls
    assert {name: pool.connection_kwargs.get(name) for name in settings} == settings


@pytest.mark.parametrize(
    ("scheme", "primary", "of_sentinels"),
    [
        ("sentinel", sentinel.PrimaryTcpConnection, pool.TcpConnection),
        ("sentinels", sentinel.PrimaryTlsConnection, pool.TlsConnection),
    ],
)
def test_sentinel_url_with_tls_uses_tls_for_the_primary_too(
    scheme: str, primary: type[Any], of_sentinels: type[Any]
) -> None:
    tls = Tls(ca_file=__file__)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tls, "context", lambda self: None)  # `ca_file` is no certificate
        made = connect(f"{scheme}://u:p@a:1,b/main/2", tls=tls if scheme == "sentinels" else None).connection_pool
    assert isinstance(made, SentinelConnectionPool)
    assert made.connection_class is primary
    assert made.connection_kwargs["username"] == "u"
    assert (made.service_name, made.connection_kwargs["db"]) == ("main", 2)
    asked = [one.connection_pool for one in made.sentinel_manager.sentinels]
    assert [one.connection_class for one in asked] == [of_sentinels, of_sentinels]
    assert [one.connection_kwargs["host"] for one in asked] == ["a", "b"]
    assert [one.connection_kwargs["port"] for one in asked] == [1, sentinel.SENTINEL_PORT]
    for one in (made, *asked):
        assert one.connection_kwargs.get("tls") is (tls if scheme == "sentinels" else None)


def test_connections_time_out_later_than_blocking_reads() -> None:
    settings = connect("redis://host").connection_pool.connection_kwargs
    assert settings["socket_timeout"] == SOCKET_SECONDS > BLOCK_SECONDS
    assert settings["socket_connect_timeout"] == connection.CONNECT_SECONDS
    assert settings["retry"].get_retries() == connection.RETRIES
    assert connect("redis://host", retries=0).connection_pool.connection_kwargs["retry"].get_retries() == 0


def retries_of(connection: Any) -> int:
    retries: int = connection.retry.get_retries()
    return retries


def test_client_with_limited_retries_repeats_a_command_once() -> None:
    client = connect("redis://host")
    pool = client.connection_pool
    before = pool.make_connection()
    limit_retries(client)
    assert [retries_of(one) for one in (before, pool.make_connection())] == [1, 1]
    impatient = connect("redis://host", retries=0)
    limit_retries(impatient)
    retry = impatient.get_retry()
    assert retry is not None
    assert retry.get_retries() == 0


@pytest.mark.parametrize(
    "url", ["http://host", "host:6379", "", "REDIS://host", f"mysql://u:{SECRET}@host", f"u:{SECRET}@h"]
)
def test_unsupported_url_error_lists_the_accepted_forms(url: str) -> None:
    with pytest.raises(
        ConfigurationError, match=r"redis\.url = '\w*://…': unknown scheme; write one of redis://, rediss://, unix://"
    ) as caught:
        connect(url)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        f"redis://:{SECRET}",
        f"redis://user:{SECRET}@host:port",
        f"redis://user:{SECRET}#x@host",
        f"redis://user:pre[{SECRET}@host",
        f"redis://host?socket_timeout={SECRET}",
        f"unix:///x?db=a&password={SECRET}",
        f"sentinel://u:{SECRET}@host",
        f"sentinel://host:{SECRET}/service",
        f"sentinels://u:{SECRET}@host",
    ],
)
def test_malformed_url_error_shows_no_part_of_the_url(url: str) -> None:
    with pytest.raises(ConfigurationError, match=r"redis\.url = '(redis|unix|sentinels?)://…': .*PASSWORD") as caught:
        connect(url)
    assert SECRET not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        (f"redis://:{SECRET}@host:6379/0", "redis://host:6379/0"),
        (f"redis://alice:{SECRET}@host", "redis://alice@host"),
        (f"rediss://alice:{SECRET}@a@host", "rediss://alice@host"),
        (f"unix:///tmp/s.sock?password={SECRET}", "unix:///tmp/s.sock"),
        (f"unix://alice:{SECRET}@/tmp/s.sock", "unix://alice@/tmp/s.sock"),
        (f"redis://host?password={SECRET}@x", "redis://host"),
        (f"redis://:{SECRET}", "redis://…"),
        (f"alice:{SECRET}@host", "://…"),
        (f"sentinel://alice:{SECRET}@a:1,b,c:3/service/0", "sentinel://alice@a:1,b,c:3/service/0"),
        (f"redis://u:{SECRET}?@host", "redis://…"),
        (f"redis://u:{SECRET}@[::1]:6379", "redis://u@[::1]:6379"),
        ("redis://host:6379", "redis://host:6379"),
    ],
)
def test_password_is_removed_from_a_url(url: str, shown: str) -> None:
    assert without_password(url) == shown
    assert SECRET not in without_password(url)


def test_unreachable_server_is_named_without_the_password(tmp_path: Path) -> None:
    url = f"unix://alice:{SECRET}@{tmp_path}/none.sock"
    client = connect(url, retries=0)
    with pytest.raises(ServerUnavailable, match=r"no Redis at unix://alice@.*none\.sock: ") as caught:
        check(client, url)
    assert SECRET not in str(caught.value)
    assert isinstance(caught.value, FedqueueError)


def test_reachable_server_passes_the_check(fake_client: redis.Redis) -> None:
    check(fake_client, "redis://fake")


def pack(connection: Any, *words: object) -> Any:
    return connection.pack_command(*words)


def send(connection: Any, *words: object) -> None:
    connection.send_command(*words)


def test_large_arguments_are_not_copied_into_the_command() -> None:
    """hiredis's packer copies a blob, so the Python packer, which makes no copy, packs each command with a blob."""
    made = connect("redis://host").connection_pool.make_connection()
    large = memoryview(bytes(100_000))
    packed = pack(made, "SET", "key", large)
    assert any(part is large for part in packed)


@given(st.lists(st.text(max_size=5) | st.binary(max_size=9) | st.integers() | st.floats(allow_nan=False), max_size=6))
def test_both_packers_produce_the_same_bytes(arguments: Any) -> None:
    made = connect("redis://host").connection_pool.make_connection()
    quick = b"".join(pack(made, "HSET", "key", *arguments))
    with_blob = b"".join(map(bytes, pack(made, "HSET", "key", *arguments, memoryview(b""))))
    count, end = 2 + len(arguments), b"$0\r\n\r\n"
    assert with_blob == quick.replace(b"*%d\r\n" % count, b"*%d\r\n" % (count + 1), 1) + end


@pytest.mark.server
def test_binary_values_survive_a_unix_socket_connection(server_client: redis.Redis) -> None:
    blob = bytes(range(256)) * 1000
    server_client.set("blob", memoryview(blob))
    assert server_client.get("blob") == blob
    assert isinstance(server_client.connection_pool.get_connection(), redis.connection.UnixDomainSocketConnection)


# The pool


@pytest.mark.server
def test_pool_replaces_a_closed_connection(server_client: redis.Redis) -> None:
    pool = server_client.connection_pool
    first = pool.get_connection()
    send(first, "CLIENT", "ID")
    number = first.read_response()
    pool.release(first)
    other = pool.get_connection(), pool.get_connection()
    send(other[1], "CLIENT", "KILL", "ID", number)
    assert other[1].read_response() == 1
    for lent in reversed(other):
        pool.release(lent)
    retry = server_client.get_retry()
    assert retry is not None
    retry.update_retries(0)
    assert [server_client.echo(text) for text in ("a", "b")] == [b"a", b"b"]


@pytest.mark.server
def test_leftover_reply_is_never_read_as_the_next_one(server_client: redis.Redis) -> None:
    pool = server_client.connection_pool
    broken_off = pool.get_connection()
    send(broken_off, "ECHO", "of before")
    assert broken_off.can_read(timeout=5)
    pool.release(broken_off)
    assert server_client.echo("mine") == b"mine"


@pytest.mark.server
def test_pool_hands_out_and_takes_back_a_connection_once(server_client: redis.Redis) -> None:
    pool = server_client.connection_pool
    first, second = pool.get_connection(), pool.get_connection()
    assert first is not second
    pool.release(first)
    pool.release(first)
    again = pool.get_connection(), pool.get_connection()
    assert first in again
    assert len({id(lent) for lent in (second, *again)}) == 3


@pytest.mark.slow
@pytest.mark.server
def test_child_process_does_not_use_its_parents_connection(server_client: redis.Redis) -> None:
    server_client.ping()
    pool = server_client.connection_pool
    mine = pool.get_connection()
    pool.release(mine)
    child = os.fork()
    if not child:
        try:
            os._exit(0 if pool.get_connection() is not mine and server_client.ping() else 1)
        finally:
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0
    assert server_client.ping()
