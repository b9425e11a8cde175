"""Commands in one exchange, and parts of values, received right where they belong.

redis-py hands out a `bytes` that hiredis has put together from pieces of 64 KiB: each byte is copied four times, and
ten megabytes take ten times as long as the socket needs. Here a part whose size is known goes from the socket into the
caller's memory; whatever else a server may answer (an error, nothing, another size) takes redis-py's own way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import redis
from redis._parsers.hiredis import _HiredisParser

CLOSED = "the server closed the connection"
Answer: TypeAlias = bytes | None
Command: TypeAlias = tuple[Any, ...]


@dataclass(frozen=True)
class Part:
    """Bytes `start` to `end`, inclusive, of the string at `key`; wanted in `into`, where it is given."""

    key: str
    start: int
    end: int
    into: memoryview | None = None


class ReceivingParser(_HiredisParser):
    """hiredis's, which stands aside for an answer that has a place."""

    def receive(self, into: memoryview) -> bool:
        """Fill `into` with the next answer, if that is a string of just its size; else it waits for `read_response`."""
        if self._sock is None or self._reader is None:
            raise redis.ConnectionError(CLOSED)
        if self._reader.has_data():
            return False
        head = b"$%d\r\n" % into.nbytes
        scratch = memoryview(self._buffer)
        got = self._more(scratch)
        if not self._buffer.startswith(head) or got < len(head):  # not it, or cut in two on the way: rare
            self._reader.feed(self._buffer, 0, got)  # type: ignore[arg-type]  # as redis-py does
            return False
        filled = min(got - len(head), into.nbytes)
        end = len(head) + filled
        into[:filled] = scratch[len(head) : end]
        while filled < into.nbytes:
            filled += self._more(into[filled:])
        missing = end + 2 - got  # of the line's end
        while missing > 0:
            missing -= self._more(scratch[:missing])
        if missing < 0:
            self._reader.feed(self._buffer, end + 2, -missing)  # type: ignore[arg-type]  # the next answer
        return True

    def _more(self, into: memoryview) -> int:
        if not (count := int(self._sock.recv_into(into))):
            raise redis.ConnectionError(CLOSED)
        return count


class Receiving:
    """For a connection of redis-py's whose parser is a ReceivingParser."""

    def receive(self, into: memoryview) -> Answer:
        """The next answer; None where it is a string of just the size of `into`, which is filled then."""
        connection = cast(Any, self)
        try:
            if connection._parser.receive(into):
                return None
        except TimeoutError as error:
            connection.disconnect()
            raise redis.TimeoutError("the server has sent nothing for too long") from error
        except OSError as error:
            connection.disconnect()
            raise redis.ConnectionError(f"reading from the server: {error}") from error
        except BaseException:  # a signal handler may raise in the middle of it
            connection.disconnect()
            raise
        return cast(Answer, _placed(connection.read_response(), into))


def _placed(got: Any, into: memoryview | None) -> Any:
    if into is None or not isinstance(got, bytes) or len(got) != into.nbytes:
        return got
    into[:] = got
    return None


def exchange(client: redis.Redis, commands: Sequence[Command], places: Sequence[memoryview | None] = ()) -> list[Any]:
    """Send all of the commands at once; returns the answers as the server gives them, errors among them.

    Of an answer that is a string of just the size of its place that place is filled, and None stands for it. After a
    lost connection all are sent again, so they may be repeated. This is redis-py's pipeline without what it does for
    others: telemetry, callbacks, the whole command in an error's text.
    """
    places = places or [None] * len(commands)
    pool = client.connection_pool
    if not issubclass(pool.connection_class, Receiving):  # fakeredis
        return _copied(client, commands, places)
    connection: Any = pool.get_connection()
    try:
        return connection.retry.call_with_retry(  # type: ignore[no-any-return]
            lambda: _exchanged(connection, commands, places), lambda error: connection.disconnect()
        )
    finally:
        pool.release(connection)


def get_parts(client: redis.Redis, parts: Sequence[Part]) -> list[Answer]:
    """Read all of them in one exchange. None stands for one whose place is filled: it had just that size."""
    commands = [("GETRANGE", part.key, part.start, part.end) for part in parts]
    return checked(exchange(client, commands, [part.into for part in parts]))


def checked(answers: list[Any]) -> list[Any]:
    """The same answers; raises the first that is an error."""
    for answer in answers:
        if isinstance(answer, Exception):
            raise answer
    return answers


def _exchanged(connection: Any, commands: Sequence[Command], places: Sequence[memoryview | None]) -> list[Any]:
    answers: list[Any] = []
    try:
        connection.send_packed_command(connection.pack_commands(commands))
        for place in places:
            try:
                answers.append(connection.receive(place) if place else connection.read_response())
            except redis.ResponseError as error:  # the answers behind it have to be read, too
                answers.append(error)
    except BaseException:  # or between two: the next command would get what is left
        connection.disconnect()
        raise
    return answers


def _copied(client: redis.Redis, commands: Sequence[Command], places: Sequence[memoryview | None]) -> list[Any]:
    pipe = client.pipeline(transaction=False)
    for command in commands:
        pipe.execute_command(*command)  # type: ignore[no-untyped-call]
    answers = pipe.execute(raise_on_error=False)
    return [_placed(got, into) for got, into in zip(answers, places, strict=True)]
