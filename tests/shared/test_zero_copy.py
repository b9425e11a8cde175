"""Replies received into buffers do not depend on how the network splits them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st
from redis.connection import Connection

from fedqueue.transport import zero_copy
from fedqueue.transport.connection import connect
from fedqueue.transport.zero_copy import Part, Receiving, ReceivingParser, exchange, get_parts
from fedqueue_coordinator.operator.embedded_server import EmbeddedServer


class Wire:
    """A socket that delivers `data` in pieces of the given sizes, then the remaining bytes, then end of file."""

    def __init__(self, data: bytes, sizes: Sequence[int]) -> None:
        self.data, self.sizes = data, list(sizes)

    def recv_into(self, into: bytearray | memoryview) -> int:
        size = min(self.sizes.pop(0) if self.sizes else len(self.data), len(into), len(self.data))
        into[:size], self.data = self.data[:size], self.data[size:]
        return size

    def close(self) -> None: ...
    def shutdown(self, how: int) -> None: ...


class WireConnection(Receiving, Connection):
    def __init__(self, wire: Wire) -> None:
        super().__init__(parser_class=ReceivingParser, socket_read_size=64)  # type: ignore[no-untyped-call]
        self._sock = wire  # type: ignore[assignment]  # redis-py declares None alone
        self._parser.on_connect(self)


def answer(data: bytes) -> bytes:
    return b"$%d\r\n%s\r\n" % (len(data), data)


@given(
    strings=st.lists(st.tuples(st.binary(max_size=200), st.integers(-1, 1)), min_size=1, max_size=5),
    sizes=st.lists(st.integers(1, 70), max_size=40),
)
def test_replies_are_whole_and_in_order_for_any_network_split(strings: list[tuple[Any, ...]], sizes: list[Any]) -> None:
    """A buffer has the size of its reply, or one byte less or more; some replies have no buffer."""
    connection = WireConnection(Wire(b"".join(answer(data) for data, _ in strings), sizes))
    for data, off in strings:
        place = bytearray(max(1, len(data) + off))
        got = connection.receive(memoryview(place))
        assert (bytes(place) if got is None else got) == data
        assert (got is None) == (len(place) == len(data))


def test_reply_of_the_expected_size_is_not_copied() -> None:
    place = bytearray(1000)
    assert WireConnection(Wire(answer(bytes(range(250)) * 4), [])).receive(memoryview(place)) is None
    assert place == bytes(range(250)) * 4


def test_truncated_reply_is_an_error_and_closes_the_connection() -> None:
    connection = WireConnection(Wire(answer(bytes(500))[:300], []))
    with pytest.raises(redis.ConnectionError, match=zero_copy.CLOSED):
        connection.receive(memoryview(bytearray(500)))
    assert connection._sock is None


@pytest.mark.server
def test_error_reply_keeps_the_connection_in_sync(server: EmbeddedServer, server_client: redis.Redis) -> None:
    client = connect(server.url)
    client.set("part", b"0123456789")
    client.rpush("list", "no string")
    place = bytearray(4)
    with pytest.raises(redis.ResponseError, match="WRONGTYPE"):
        get_parts(client, [Part("list", 0, 3), Part("part", 2, 5, memoryview(place)), Part("list", 0, 3)])
    assert bytes(place) == b"2345"
    assert get_parts(client, [Part("part", 0, 1), Part("part", 6, 9, memoryview(place))]) == [b"01", None]
    assert bytes(place) == b"6789"
    client.close()


@pytest.mark.server
def test_signal_during_a_reply_leaves_no_half_read_connection(
    server: EmbeddedServer, server_client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = connect(server.url)
    client.set("part", bytes(range(256)) * 4000)
    more, calls = ReceivingParser._more, []

    def interrupted(self: ReceivingParser, into: memoryview) -> int:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return more(self, into)

    place = bytearray(256 * 4000)
    monkeypatch.setattr(ReceivingParser, "_more", interrupted)
    with pytest.raises(KeyboardInterrupt):
        get_parts(client, [Part("part", 0, len(place) - 1, memoryview(place))])
    assert client.ping() is True
    assert get_parts(client, [Part("part", 0, len(place) - 1, memoryview(place))]) == [None]
    assert place == bytes(range(256)) * 4000
    client.close()


@pytest.mark.server
def test_signal_between_replies_leaves_no_stale_reply(
    server: EmbeddedServer, server_client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = connect(server.url)
    cls, calls = client.connection_pool.connection_class, []
    read_response = cls.read_response

    def interrupted(self: Connection, *args: object, **kwargs: object) -> object:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return read_response(self, *args, **kwargs)

    client.ping()
    monkeypatch.setattr(cls, "read_response", interrupted)
    with pytest.raises(KeyboardInterrupt):
        exchange(client, [("ECHO", "1"), ("BLPOP", "nothing", "0.2")])  # the signal arrives before the reply of BLPOP
    assert exchange(client, [("ECHO", "2")]) == [b"2"]
    client.close()


@pytest.mark.server
def test_chunk_is_read_again_after_a_lost_connection(server: EmbeddedServer, server_client: redis.Redis) -> None:
    client = connect(server.url)
    client.set("part", b"abc")
    server_client.client_kill_filter(_type="normal", skipme=True)
    place = bytearray(3)
    assert get_parts(client, [Part("part", 0, 2, memoryview(place))]) == [None]
    assert bytes(place) == b"abc"
    client.close()
