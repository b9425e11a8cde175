"""Warns of a Redis server that refuses writes, or deletes keys, because its memory is full.

A coordinator writes little. On a server whose memory is almost full, the updates of workers are refused first, and the
coordinator would see only that none arrive.
"""

from __future__ import annotations

import redis
import structlog

from fedqueue.config.schema import Config
from fedqueue.errors import ServerUnavailable
from fedqueue.tensors.codec import downlink_codec, update_codec
from fedqueue.tensors.manifest import Manifest
from fedqueue.transport.connection import NO_EVICTION, MemoryUse, eviction, memory_use
from fedqueue.transport.retry import MORE_MEMORY

log = structlog.get_logger("fedqueue.coordinator")

VERSIONS = 2
"""Stored at the same time at least: the newest one, and the one that jobs have begun from or that is being staged."""
LOOK_SECONDS = 10.0
"""Time between two looks at the server's memory."""
AGAIN_SECONDS = 600.0
"""A warning about a state that lasts is repeated after this time."""
NEARLY_FULL = 0.9
"""Share of maxmemory from which the memory counts as nearly full."""
FULL = "Redis refuses writes, because its memory is full"
FILLING = "the memory of Redis is nearly full: it will refuse the updates of workers"


class MemoryWatch:
    """Looks at the server's memory from time to time, and warns of each state once in AGAIN_SECONDS."""

    def __init__(self, client: redis.Redis) -> None:
        self._client = client
        self._next = 0.0
        self._may_ask = True
        self._refused: int | None = None  # writes that the server had refused at the last look
        self._quiet_until: dict[str, float] = {}  # state → when it may be warned of again
        self._policy_warned = ""

    def check_policy(self, config: Config, manifest: Manifest) -> None:
        """Warn once of a server that may delete keys, or that has too little memory for the run.

        Raises ServerUnavailable where it may delete any key and the versions and one payload of each concurrent job do
        not fit: such a run is lost within seconds. A server without eviction reports that it is full, and the run
        waits.
        """
        policy, limit, _ = eviction(self._client)
        stored = VERSIONS * downlink_codec(config.compression, manifest).largest
        stored += config.concurrency * update_codec(config, manifest).largest
        what, needs = "", f"this run needs {_megabytes(stored)}"
        if policy:
            what = (
                f"Redis deletes keys when its memory is full (maxmemory-policy {policy}, maxmemory {_megabytes(limit)})"
            )
            if policy.startswith("allkeys") and stored > limit:
                raise ServerUnavailable(f"{what}, and {needs}, so the run would be lost: {NO_EVICTION}")
            what = f"{what}: {NO_EVICTION}"
        elif limit and stored > limit:
            what = f"{needs}, and maxmemory is {_megabytes(limit)}: {MORE_MEMORY}"
        if what and what != self._policy_warned:
            log.warning(
                "the server's memory policy can destroy this run" if policy else "the server's memory is too small",
                because=what,
            )
        self._policy_warned = what

    def look(self, now: float, payload: int) -> MemoryUse | None:
        """Warn if the server refuses writes, or will do so soon; asks it at most once in LOOK_SECONDS.

        `now` is in seconds of any clock, and `payload` is the number of bytes of an update. Returns what the server
        said if it was asked. Raises RedisError.
        """
        if now < self._next or not self._may_ask:
            return None
        self._next = now + LOOK_SECONDS
        use = memory_use(self._client)
        if use is None:
            self._may_ask = False
            return None
        before, self._refused = self._refused, use.refused
        state = self._state(use, payload, refused=before is not None and use.refused > before)
        if not state or now < self._quiet_until.get(state, now):
            return use
        for said in (FULL, FILLING) if state == FULL else (FILLING,):
            self._quiet_until[said] = now + AGAIN_SECONDS
        used = f"{_megabytes(use.used)} of maxmemory {_megabytes(use.limit)}"
        log.warning(state, used=used, update=_megabytes(payload), do=MORE_MEMORY)
        return use

    def _state(self, use: MemoryUse, payload: int, refused: bool) -> str:
        if not use.limit:
            return ""
        if refused:
            return FULL
        if use.evicts_any:  # such a server is always full, and deletes keys instead
            return ""
        return FILLING if use.used + payload > use.limit or use.used >= NEARLY_FULL * use.limit else ""


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
