"""Follows a run's ledger in Redis: each read continues where the last one ended, so that no record is read twice."""

from __future__ import annotations

from typing import Any, cast

from fedqueue.errors import StoreError
from fedqueue.protocol.msgpack import unpack_record
from fedqueue.transport.store import Store

MOST = 1000
"""Records of one read."""
BEFORE_THE_FIRST = b"0-0"


class LedgerReplaced(StoreError):
    """The ledger's record that was read last is gone: the run was deleted, or Redis lost it and its leader restored it.

    A new `LedgerTail` reads the ledger that is there now from its beginning. A restored ledger begins with the records
    of the former one; after them comes a record of kind `epoch`.
    """


class LedgerTail:
    """Reads the ledger of the run of `store`, oldest record first.

    >>> import fakeredis
    >>> from fedqueue.protocol.msgpack import pack_record
    >>> store = Store(fakeredis.FakeRedis(server=fakeredis.FakeServer()), "mine")
    >>> tail = LedgerTail(store)
    >>> entry = store.redis.xadd(store.keys.ledger, {"record": pack_record({"kind": "version", "version": 1})})
    >>> tail.read()
    [{'kind': 'version', 'version': 1}]
    >>> tail.read()
    []
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._last = BEFORE_THE_FIRST

    def read(self, most: int = MOST) -> list[dict[str, Any]]:
        """Return the next records, at most `most`; empty if none was appended since the last read.

        Raises LedgerReplaced. The right of the Redis user `viewer` suffices.
        """
        begun = self._last != BEFORE_THE_FIRST
        found = self._store.redis.xrange(self._store.keys.ledger, self._last, count=most + begun)
        entries = cast(list[tuple[bytes, dict[bytes, bytes]]], found)
        if begun:
            if not entries or entries[0][0] != self._last:
                raise LedgerReplaced(
                    f"the ledger of run {self._store.run!r} is no longer the one that was followed: the run was "
                    "deleted, or Redis lost it and it was restored from its checkpoint"
                )
            entries = entries[1:]
        if entries:
            self._last = entries[-1][0]
        return [unpack_record(fields[b"record"]) for _, fields in entries]
