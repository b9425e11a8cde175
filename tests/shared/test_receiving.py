"""Answers received in place: what arrives does not depend on how the network cuts it up."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st
from redis.connection import Connection

from fedqueue.transport import zero_copy
from fedqueue.transport.connection import connect
from fedqueue.transport.zero_copy import Part, Receiving, ReceivingParser, exchange, get_parts


class Wire:
    """A socket that brings `data` in pieces of the given sizes, then what is left, then its end."""

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
        super().__init__(parser_class=ReceivingParser, socket_read_size=64)
        self._sock = wire
        self._parser.on_connect(self)


def answer(data: bytes) -> bytes:
    return b"$%d\r\n%s\r\n" % (len(data), data)


@given(
    strings=st.lists(st.tuples(st.binary(max_size=200), st.integers(-1, 1)), min_size=1, max_size=5),
    sizes=st.lists(st.integers(1, 70), max_size=40),
)
def test_answers_arrive_whole_and_in_order_however_they_are_cut(strings, sizes):
    """A place may be as large as its answer, a byte smaller or larger; and some answers have none."""
    connection = WireConnection(Wire(b"".join(answer(data) for data, _ in strings), sizes))
    for data, off in strings:
        place = bytearray(max(1, len(data) + off))
        got = connection.receive(memoryview(place))
        assert (bytes(place) if got is None else got) == data
        assert (got is None) == (len(place) == len(data))


def test_place_of_an_answer_of_its_size_is_filled_without_a_copy():
    place = bytearray(1000)
    assert WireConnection(Wire(answer(bytes(range(250)) * 4), [])).receive(memoryview(place)) is None
    assert place == bytes(range(250)) * 4


def test_end_of_the_connection_in_the_middle_of_an_answer_is_an_error_and_closes_it():
    connection = WireConnection(Wire(answer(bytes(500))[:300], []))
    with pytest.raises(redis.ConnectionError, match=zero_copy.CLOSED):
        connection.receive(memoryview(bytearray(500)))
    assert connection._sock is None


@pytest.mark.server
def test_error_among_several_parts_is_raised_and_the_connection_stays_in_step(server, server_client):
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
def test_signal_in_the_middle_of_an_answer_leaves_no_half_read_connection(server, server_client, monkeypatch):
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
def test_signal_between_two_answers_leaves_none_for_the_next_command(server, server_client, monkeypatch):
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
        exchange(client, [("ECHO", "1"), ("BLPOP", "nothing", "0.2")])  # whose answer is still to come
    assert exchange(client, [("ECHO", "2")]) == [b"2"]
    client.close()


@pytest.mark.server
def test_connection_that_was_cut_is_made_again_and_the_part_read(server, server_client):
    client = connect(server.url)
    client.set("part", b"abc")
    server_client.client_kill_filter(_type="normal", skipme=True)
    place = bytearray(3)
    assert get_parts(client, [Part("part", 0, 2, memoryview(place))]) == [None]
    assert bytes(place) == b"abc"
    client.close()
