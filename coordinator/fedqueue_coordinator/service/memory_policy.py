"""Checks, before a run begins or is resumed, that Redis does not delete its keys when memory is full."""

from __future__ import annotations

import redis
import structlog

from fedqueue.config.schema import Config
from fedqueue.errors import ServerUnavailable
from fedqueue.tensors.codec import downlink_codec, uplink_codec
from fedqueue.tensors.manifest import Manifest
from fedqueue.transport.connection import NO_EVICTION, eviction

log = structlog.get_logger("fedqueue.coordinator")

VERSIONS = 2
"""Stored at the same time at least: the newest one, and the one that jobs have begun from or that is being staged."""


def check_memory_policy(client: redis.Redis, config: Config, manifest: Manifest) -> None:
    """Warn of a server that may delete keys.

    Raises ServerUnavailable where it may delete any key and the versions and one payload of each concurrent job do not
    fit: such a run is lost within seconds. A server without eviction would report that it is full, and the run would
    wait.
    """
    policy, limit, _ = eviction(client)
    if not policy:
        return
    stored = VERSIONS * downlink_codec(config.compression, manifest).largest
    stored += config.concurrency * uplink_codec(config.compression, manifest, config.secure.on).largest
    what = f"Redis deletes keys when its memory is full (maxmemory-policy {policy}, maxmemory {_megabytes(limit)})"
    if policy.startswith("allkeys") and stored > limit:
        raise ServerUnavailable(
            f"{what}, and this run needs {_megabytes(stored)}, so the run would be lost: {NO_EVICTION}"
        )
    log.warning("the server's memory policy can destroy this run", because=f"{what}: {NO_EVICTION}")


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
