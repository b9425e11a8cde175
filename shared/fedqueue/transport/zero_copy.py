"""Several commands in one round trip, with replies of known size received directly into the caller's memory.

redis-py returns a `bytes` that hiredis has assembled from pieces of 64 KiB. Each byte is copied four times, and ten
megabytes take ten times as long as the socket needs. Here a reply whose size is known goes from the socket into the
caller's buffer. Any other reply (an error, nil, another size) goes through redis-py's parser.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import redis
from redis._parsers.hiredis import _HiredisParser

CLOSED = "the server closed the connection"
SENT_AT_ONCE = 256 * 1024  # bytes that have to be sent before the socket's timeout
Answer: TypeAlias = bytes | None
"""A reply to a read; None if it was received into a buffer."""
Command: TypeAlias = tuple[Any, ...]
Moved: TypeAlias = Callable[[], None]
"""Called whenever bytes have been sent or received; it may raise, which ends the transfer."""


def ignore_moved() -> None:
    """No-op, where no caller follows a transfer."""


@dataclass(frozen=True)
class Part:
    """Bytes `start` to `end`, inclusive, of the string at `key`, and the buffer to receive them into, if any."""

    key: str
    start: int
    end: int
    into: memoryview | None = None


class ReceivingParser(_HiredisParser):
    """hiredis parser that can read one bulk reply directly into a buffer."""

    def receive(self, into: memoryview, moved: Moved = ignore_moved) -> bool:
        """Fill `into` with the next reply if that is a bulk string of exactly its size.

        Returns False for any other reply, which stays buffered for `read_response`. Calls `moved` after each part.
        """
        if self._sock is None or self._reader is None:
            raise redis.ConnectionError(CLOSED)
        if self._reader.has_data():
            return False
        head = b"$%d\r\n" % into.nbytes
        scratch = memoryview(self._buffer)
        got = self._more(scratch)
        if not self._buffer.startswith(head) or got < len(head):  # another reply, or a split header: rare
            self._reader.feed(self._buffer, 0, got)  # type: ignore[arg-type]  # as redis-py does
            return False
        filled = min(got - len(head), into.nbytes)
        end = len(head) + filled
        into[:filled] = scratch[len(head) : end]
        while filled < into.nbytes:
            filled += self._more(into[filled:])
            moved()
        missing = end + 2 - got  # bytes of the final CR LF
        while missing > 0:
            missing -= self._more(scratch[:missing])
        if missing < 0:
            self._reader.feed(self._buffer, end + 2, -missing)  # type: ignore[arg-type]  # the next reply
        return True

    def _more(self, into: memoryview) -> int:
        if not (count := int(self._sock.recv_into(into))):
            raise redis.ConnectionError(CLOSED)
        return count


class Receiving:
    """Mixin for a redis-py connection whose parser is a ReceivingParser."""

    def receive(self, into: memoryview, moved: Moved = ignore_moved) -> Answer:
        """The next reply; None if it is a string of exactly the size of `into`, which then contains it.

        Raises redis-py's TimeoutError and ConnectionError, after disconnecting.
        """
        connection = cast(Any, self)
        try:
            if connection._parser.receive(into, moved):
                return None
        except TimeoutError as error:
            connection.disconnect()
            raise redis.TimeoutError("the server sent nothing before the timeout") from error
        except OSError as error:
            connection.disconnect()
            raise redis.ConnectionError(f"reading from the server: {error}") from error
        except BaseException:  # a signal handler may raise in the middle of a reply
            connection.disconnect()
            raise
        return cast(Answer, _copied_into(connection.read_response(), into))


def _copied_into(got: Any, into: memoryview | None) -> Any:
    """Copy a reply of exactly the size of `into` there and return None; return any other reply."""
    if into is None or not isinstance(got, bytes) or len(got) != into.nbytes:
        return got
    into[:] = got
    return None


def exchange(
    client: redis.Redis,
    commands: Sequence[Command],
    buffers: Sequence[memoryview | None] = (),
    moved: Moved = ignore_moved,
) -> list[Any]:
    """Send all commands in one round trip; returns the server's replies in order, with errors as exceptions.

    A reply that is a string of exactly the size of its buffer is received into that buffer, and None is returned in
    its position. After a lost connection all commands are sent again, so each of them must be safe to repeat. This
    is redis-py's pipeline without its telemetry, its callbacks and the whole command in an error's text. `moved` is
    called while a large command or reply is on its way, after each part of it.
    """
    buffers = buffers or [None] * len(commands)
    pool = client.connection_pool
    if not issubclass(pool.connection_class, Receiving):  # fakeredis
        return _exchange_with_copies(client, commands, buffers)
    connection: Any = pool.get_connection()
    try:
        return connection.retry.call_with_retry(  # type: ignore[no-any-return]
            lambda: _exchange_once(connection, commands, buffers, moved), lambda error: connection.disconnect()
        )
    finally:
        pool.release(connection)


def get_parts(client: redis.Redis, parts: Sequence[Part], moved: Moved = ignore_moved) -> list[Answer]:
    """Read all parts in one round trip; None stands for a part that had exactly the size of its buffer."""
    commands = [("GETRANGE", part.key, part.start, part.end) for part in parts]
    return checked(exchange(client, commands, [part.into for part in parts], moved))


def checked(answers: list[Any]) -> list[Any]:
    """The same replies; raises the first that is an error."""
    for answer in answers:
        if isinstance(answer, Exception):
            raise answer
    return answers


def in_parts(packed: Iterable[Any], moved: Moved) -> Iterator[Any]:
    """Cut a packed command into parts of at most SENT_AT_ONCE bytes; calls `moved` after each part was sent.

    Python's `sendall` has one timeout for all that it is given: so the timeout is for a part, not for a blob.
    """
    for item in packed:
        if len(item) <= SENT_AT_ONCE:
            yield item
            continue
        view = memoryview(item)
        for start in range(0, view.nbytes, SENT_AT_ONCE):
            yield view[start : start + SENT_AT_ONCE]
            moved()


def _exchange_once(
    connection: Any, commands: Sequence[Command], buffers: Sequence[memoryview | None], moved: Moved
) -> list[Any]:
    answers: list[Any] = []
    try:
        connection.send_packed_command(in_parts(connection.pack_commands(commands), moved))
        for buffer in buffers:
            try:
                answers.append(connection.receive(buffer, moved) if buffer else connection.read_response())
            except redis.ResponseError as error:  # the replies after it have to be read, too
                answers.append(error)
    except BaseException:  # the next command on this connection would receive the unread replies
        connection.disconnect()
        raise
    return answers


def _exchange_with_copies(
    client: redis.Redis, commands: Sequence[Command], buffers: Sequence[memoryview | None]
) -> list[Any]:
    """`exchange` by means of redis-py's pipeline."""
    pipe = client.pipeline(transaction=False)
    for command in commands:
        pipe.execute_command(*command)  # type: ignore[no-untyped-call]
    answers = pipe.execute(raise_on_error=False)
    return [_copied_into(got, into) for got, into in zip(answers, buffers, strict=True)]
