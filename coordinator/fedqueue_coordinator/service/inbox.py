"""Reads the workers' reports: one stream for each client, and a wakeup channel that names the streams with new entries.

A worker can only write to its own client's stream. Redis can wait for many streams at once, but it visits each of them
every time, so ten thousand clients would make every update expensive. Instead, the script that appends an entry also
publishes the name of the stream on the run's wakeup channel. Notifications are hints: they may be lost or spurious, so
`sweep_some` reads streams without one: those of clients with an open job each time, and the others in turn.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Container, Iterable, Mapping
from typing import Any, cast

import redis
from redis.client import PubSub

from fedqueue.protocol.keys import Keys
from fedqueue.protocol.stream_entry import StreamEntry

FIRST = "0-0"  # before the first entry of a stream
MOST_WAKEUPS = 1000  # notifications that are received before the streams they name are read
STREAMS_AT_ONCE = 64  # streams of each kind in one read
SWEPT = 500  # clients whose streams are read in one step of a sweep
SUBSCRIBED_SECONDS = 5.0
SILENT_SECONDS = 10.0  # without a notification, after which an entry without one means that the subscription is lost
LONGEST_NAME = 512  # bytes of a stream's name


class Inbox:
    """Reads each entry once. The entries of one read are in the order in which they were written."""

    def __init__(self, client: redis.Redis, keys: Keys, clock: Callable[[], float] = time.monotonic) -> None:
        self._redis, self._keys, self._clock = client, keys, clock
        self._heard = clock()  # time of the last notification
        self._wakeup: PubSub | None = None
        self._last: dict[str, str] = {}  # stream → ID of its last entry that was read
        self._busy: Container[str] = ()
        # Streams to read, in the order of their notifications: those to read first, and the others.
        self._urgent: dict[str, None] = {}
        self._named: dict[str, None] = {}
        self._cursor = 0  # of the clients that `sweep_some` has reached

    def read_first(self, clients: Container[str]) -> None:
        """Read the streams of `clients`, those with an open job, and the coordinator's own before others.

        So an update waits for one portion of the joins that came before it.
        """
        self._busy = clients

    def receive(self, block_seconds: float, count: int = 32) -> list[StreamEntry]:
        """Return the next entries, at most `count` of each client; wait for the first for at most `block_seconds`.

        One read has STREAMS_AT_ONCE streams at most of those to read first, and as many of the others.
        """
        if self._wakeup is None:
            self._listen()
            self._name(self._streams())
        self._hear(block_seconds)
        streams = [*_taken(self._urgent), *_taken(self._named)]
        return self._read(streams, count) if streams else []

    def sweep(self, count: int = 32) -> list[StreamEntry]:
        """Return the next entries of all streams, at most `count` of each, without waiting for a notification."""
        return self._read(self._streams(), count)

    def sweep_some(self, clients: Iterable[str], count: int = 32) -> list[StreamEntry]:
        """Return the next entries of the coordinator's own stream, those of `clients`, and those of SWEPT others.

        Each call takes other ones, in turn: an idle client costs nothing, and no lost notification stays unnoticed.
        """
        self._cursor, some = self._redis.sscan(self._keys.clients, self._cursor, count=SWEPT)
        named = {"", *clients, *(client.decode() for client in cast(list[bytes], some))}
        entries = self._read([self._keys.updates(client) for client in sorted(named)], count)
        if entries and self._clock() - self._heard > SILENT_SECONDS:
            self.close()  # a proxy may drop a connection without closing it; the next `receive` subscribes again
        return entries

    def unacknowledged(self, clients: Iterable[str] | None = None) -> list[StreamEntry]:
        """Return the entries of `clients`, by default of all, that no script has acknowledged, oldest first.

        A script acknowledges an entry by deleting it, in the same step as its effect. So the result is the content of
        their streams and of the coordinator's own: the buffer, and new entries. `receive` continues after it, and
        returns the content of the other streams in portions.
        """
        self._listen()
        self._last, self._urgent, self._named = {}, {}, {}
        every = self._streams()
        first = {*every} if clients is None else {self._keys.updates(client) for client in ("", *clients)}
        self._name(stream for stream in every if stream not in first)
        return self._read(sorted(first), None)

    def close(self) -> None:
        """Stop listening."""
        if self._wakeup:
            self._wakeup.close()
            self._wakeup = None

    def _listen(self) -> None:
        """Subscribe to the wakeup channel. The caller reads all streams next, as earlier notifications are missed."""
        self.close()
        self._wakeup = self._redis.pubsub()  # type: ignore[no-untyped-call]
        self._wakeup.subscribe(self._keys.wakeup)
        self._heard = self._clock()
        self._wakeup.get_message(timeout=SUBSCRIBED_SECONDS)  # so that none is lost between this and the first read

    def _hear(self, block_seconds: float) -> None:
        """Receive notifications. Unless streams are left to read, wait for the first one, at most `block_seconds`.

        An answer of a keeper, which the caller reads itself, ends the wait too.
        """
        assert self._wakeup is not None
        deadline, answered = time.monotonic() + block_seconds, False
        for _ in range(MOST_WAKEUPS):
            waits = not (self._urgent or self._named or answered)
            message = self._wakeup.get_message(timeout=max(0.0, deadline - time.monotonic()) if waits else 0.0)
            if message is None:
                if not waits or time.monotonic() >= deadline:
                    break
            elif message["type"] == "subscribe":  # again, after a lost connection: notifications were missed
                self._name(self._streams())
            else:
                self._heard = self._clock()
                name = cast(bytes, message["data"])[:LONGEST_NAME].decode(errors="replace")
                if name.startswith(self._keys.updates_prefix):
                    self._name([name])
                answered = answered or name.startswith(self._keys.says_prefix)

    def _name(self, streams: Iterable[str]) -> None:
        """Let the next reads have these streams."""
        for stream in streams:
            client = stream.removeprefix(self._keys.updates_prefix)
            if not client or client in self._busy:
                self._named.pop(stream, None)
                self._urgent[stream] = None
            elif stream not in self._urgent:
                self._named[stream] = None

    def _streams(self) -> list[str]:
        """Return the stream of each client, and the coordinator's own."""
        clients = cast(set[bytes], self._redis.smembers(self._keys.clients))
        return [self._keys.updates(client) for client in ("", *sorted(c.decode() for c in clients))]

    def _read(self, streams: Iterable[str], count: int | None) -> list[StreamEntry]:
        """Return the next entries, at most `count` of each stream; a stream with more is read again."""
        after = {stream: self._last.get(stream, FIRST) for stream in streams}
        found = by_stream(self._redis.xread(cast(Any, after), count=count))
        if count:
            self._name(stream for stream, entries in found.items() if len(entries) >= count)
        return self._received(found)

    def _received(self, raw: Mapping[str, Any]) -> list[StreamEntry]:
        """Return the entries of several streams in the order in which they were written."""
        entries = []
        for stream, of_stream in raw.items():
            client = stream.removeprefix(self._keys.updates_prefix)
            entries += [(_time_of(entry[0]), client, StreamEntry.from_fields(client, entry)) for entry in of_stream]
            if of_stream:
                self._last[stream] = of_stream[-1][0].decode()
        return [entry for _, _, entry in sorted(entries, key=lambda e: e[:2])]


def _taken(streams: dict[str, None]) -> list[str]:
    """Remove and return the first streams, at most STREAMS_AT_ONCE."""
    first = list(itertools.islice(streams, STREAMS_AT_ONCE))
    for stream in first:
        del streams[stream]
    return first


def by_stream(answer: Any) -> dict[str, Any]:
    """Return stream → its raw entries from a reply to XREAD: RESP3 gives a map of lists of them, RESP2 pairs."""
    if isinstance(answer, dict):
        answer = [(stream, entries[0] if entries else []) for stream, entries in answer.items()]
    return {stream.decode(): entries for stream, entries in answer or ()}


def _time_of(entry_id: bytes) -> tuple[int, int]:
    """Return when an entry was written, from its ID: the server's milliseconds, and the number within them."""
    milliseconds, _, sequence = entry_id.decode().partition("-")
    return int(milliseconds), int(sequence)
