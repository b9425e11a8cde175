"""What workers report to the coordinator: one stream for each client, and a bell that says in which there is news.

Its own stream is all that a worker can write to. Redis can wait for many streams at once, but it looks at each of them
each time, so ten thousand clients would make every update expensive. Instead, whoever appends an entry also publishes
the name of its stream on the run's channel, the bell. A ring may be lost, and anybody who may ring can ring in vain: it
is a hint, and `sweep` looks everywhere now and then.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any, cast

import redis
from redis.client import PubSub

from fedqueue.protocol.keys import Keys
from fedqueue.protocol.stream_entry import StreamEntry

FIRST = "0-0"  # before the first entry of a stream
MOST_RINGS = 1000  # that are heard before what they are about is read
SUBSCRIBED_SECONDS = 5.0
LONGEST_NAME = 512  # bytes of a stream's name


class Inbox:
    """Reads each entry once, in the order in which they were written as far as they are there."""

    def __init__(self, client: redis.Redis, keys: Keys) -> None:
        self._redis, self._keys = client, keys
        self._bell: PubSub | None = None
        self._last: dict[str, str] = {}  # stream → place of the last entry of it that was read
        self._more: set[str] = set()  # streams that had more entries than were asked for

    def receive(self, block_seconds: float, count: int = 32) -> list[StreamEntry]:
        """The next entries, at most `count` of each client, after waiting for the first for at most `block_seconds`."""
        if self._bell is None:
            self._listen()
            return self.sweep(count)
        streams = self._more | self._rung(0.0 if self._more else block_seconds)
        return self._read(streams, count) if streams else []

    def sweep(self, count: int = 32) -> list[StreamEntry]:
        """The next entries of all clients, at most `count` of each, whether or not the bell rang; does not wait."""
        return self._read(self._streams(), count)

    def unacknowledged(self) -> list[StreamEntry]:
        """Every entry that no script has acknowledged, oldest first: after a restart, the buffer and what is new.

        An entry is acknowledged by its deletion, in the same step as what it led to. So these are the whole streams,
        and `receive` goes on after them.
        """
        self._listen()
        streams = self._streams()
        self._last, self._more = {}, set()
        pipe = self._redis.pipeline(transaction=True)
        for stream in streams:
            pipe.xrange(stream)
        return self._received(dict(zip(streams, pipe.execute(), strict=True)))

    def close(self) -> None:
        """Stop listening."""
        if self._bell:
            self._bell.close()
            self._bell = None

    def _listen(self) -> None:
        """From now on; so what was rung before is to be looked for."""
        self.close()
        self._bell = self._redis.pubsub(ignore_subscribe_messages=True)  # type: ignore[no-untyped-call]
        self._bell.subscribe(self._keys.wakeup)
        self._bell.get_message(timeout=SUBSCRIBED_SECONDS)  # so that no ring is lost between this and the first look

    def _rung(self, block_seconds: float) -> set[str]:
        """The streams that the bell named, after waiting for the first for at most `block_seconds`."""
        assert self._bell is not None
        rung: set[str] = set()
        deadline = time.monotonic() + block_seconds
        for _ in range(MOST_RINGS):
            message = self._bell.get_message(timeout=0.0 if rung else max(0.0, deadline - time.monotonic()))
            if message is not None:
                name = cast(bytes, message["data"])[:LONGEST_NAME].decode(errors="replace")
                rung |= {name} if name.startswith(self._keys.updates_prefix) else set()
            elif rung or time.monotonic() >= deadline:
                break
        return rung

    def _streams(self) -> list[str]:
        """The stream of each client, and the coordinator's own."""
        clients = cast(set[bytes], self._redis.smembers(self._keys.clients))
        return [self._keys.updates(client) for client in ("", *sorted(c.decode() for c in clients))]

    def _read(self, streams: Iterable[str], count: int) -> list[StreamEntry]:
        places = {stream: self._last.get(stream, FIRST) for stream in streams}
        found = _by_stream(self._redis.xread(cast(Any, places), count=count))
        self._more = {stream for stream, entries in found.items() if len(entries) >= count}
        return self._received(found)

    def _received(self, raw: Mapping[str, Any]) -> list[StreamEntry]:
        """The entries of several streams in the order in which they were written."""
        entries = []
        for stream, of_stream in raw.items():
            client = stream.removeprefix(self._keys.updates_prefix)
            entries += [(_moment(entry[0]), client, StreamEntry.from_fields(client, entry)) for entry in of_stream]
            if of_stream:
                self._last[stream] = of_stream[-1][0].decode()
        return [entry for _, _, entry in sorted(entries, key=lambda e: e[:2])]


def _by_stream(answer: Any) -> dict[str, Any]:
    """Stream → its raw entries, of an answer to XREAD: RESP3 gives a map of lists of them, RESP2 pairs."""
    if isinstance(answer, dict):
        answer = [(stream, entries[0] if entries else []) for stream, entries in answer.items()]
    return {stream.decode(): entries for stream, entries in answer or ()}


def _moment(place: bytes) -> tuple[int, int]:
    """When an entry was written, from its place in the stream: server ms, and which one in that millisecond."""
    milliseconds, _, sequence = place.decode().partition("-")
    return int(milliseconds), int(sequence)
