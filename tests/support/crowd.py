"""A crowd of clients: many that join, leave or fall silent at about the same time, in one round trip."""

from __future__ import annotations

from collections.abc import Iterable

import redis

from fedqueue.protocol.keys import Keys
from fedqueue.protocol.messages import Registration, Unavailable
from fedqueue.transport.lua_scripts import script_digest
from fedqueue.transport.worker_store import WorkerStore

SESSION = "crowd"


class Crowd:
    """Many clients of one worker process in an unsigned run."""

    def __init__(self, client: redis.Redis, run: str) -> None:
        self._redis, self._keys = client, Keys(run)
        WorkerStore(client, run, SESSION).load_scripts()

    def join(self, clients: Iterable[str], lease_seconds: float = 3600.0) -> None:
        """Join and register the clients, with one example each."""
        pipe = self._redis.pipeline(transaction=False)
        keys = self._keys
        for client in clients:
            lease = round(1000 * lease_seconds)
            pipe.evalsha(script_digest("join"), 1, keys.clients, SESSION, lease, keys.site_prefix, client)
            body = Registration(client=client, examples=1).pack()
            streams = keys.site(client), keys.updates(client)
            pipe.evalsha(script_digest("register"), 2, *streams, SESSION, body, keys.wakeup)
        pipe.execute()

    def leave(self, clients: Iterable[str], error: str = "") -> None:
        """Let the clients leave, because of `error` where one is given."""
        pipe = self._redis.pipeline(transaction=False)
        for client in clients:
            kind, body = ("unavailable", Unavailable(client=client, error=error).pack()) if error else ("left", b"")
            streams = self._keys.site(client), self._keys.updates(client)
            pipe.evalsha(script_digest("leave"), 2, *streams, SESSION, kind, body, self._keys.wakeup)
        pipe.execute()

    def left_entries(self, clients: Iterable[str]) -> int:
        """Return the number of the clients' stream entries that are not acknowledged."""
        pipe = self._redis.pipeline(transaction=False)
        for client in clients:
            pipe.xlen(self._keys.updates(client))
        return sum(pipe.execute())
