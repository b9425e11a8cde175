"""What an error of Redis means: wait, because it passes, or stop, because waiting cannot help."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import TypeVar

import redis
import structlog

from fedqueue.errors import ServerUnavailable

log = structlog.get_logger("fedqueue.transport.retry")

FIRST_SECONDS, LONGEST_SECONDS = 0.1, 5.0

T = TypeVar("T")

# Answers that pass by themselves or with an operator's help, by the first word of their text.
TRANSIENT = {
    "OOM": "it is out of memory: raise its maxmemory, or fewer jobs at once (dispatch.concurrency)",
    "READONLY": "it is a read-only replica: waiting until it or another one is the primary",
    "LOADING": "it is loading its data",
    "MASTERDOWN": "its primary is down",
    "MISCONF": "it cannot save to its disk",
    "NOREPLICAS": "it has too few replicas",
    "CLUSTERDOWN": "the cluster is down",
    "TRYAGAIN": "the cluster is moving slots",
    "NOSCRIPT": "its scripts are gone, and this user may not load them: waiting for the coordinator to do it",
}
BY_TYPE = {  # redis-py takes the word off the text of these
    redis.BusyLoadingError: "LOADING",
    redis.ReadOnlyError: "READONLY",
    redis.exceptions.NoScriptError: "NOSCRIPT",
}


def transient_reason(error: redis.RedisError) -> str:
    """Why waiting makes sense, in words, or an empty string where it does not (a wrong password, a missing right)."""
    refused = redis.AuthenticationError, redis.exceptions.AuthorizationError, redis.exceptions.NoPermissionError
    if isinstance(error, refused):
        return ""
    text = str(error)
    for kind, word in BY_TYPE.items():
        if isinstance(error, kind):
            return TRANSIENT[word]
    if isinstance(error, redis.exceptions.OutOfMemoryError) or text.startswith("command not allowed when used"):
        return TRANSIENT["OOM"]
    if isinstance(error, redis.ConnectionError | redis.TimeoutError):
        return f"it does not answer ({text})"
    return TRANSIENT.get(text.partition(" ")[0], "")


def _hint(error: redis.RedisError) -> str:
    """What may be behind a missing right: Redis itself names neither the key nor who should have it."""
    text = str(error)
    denied = isinstance(error, redis.exceptions.NoPermissionError) or "ACL failure" in text or "can't access" in text
    if not denied:
        return ""
    return (
        " (a worker's Redis user serves its own client only, and the scripts of the version that wrote the rules: "
        "--client, or `fedqueue acl` again)"
    )


class RedisRetry:
    """Rides out an outage: backoff with jitter, said once per kind of trouble, reset by success."""

    def __init__(
        self,
        given_up: Callable[[], bool] = lambda: False,
        sleep: Callable[[float], None] = time.sleep,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._given_up, self._sleep, self._jitter = given_up, sleep, jitter
        self._failures = 0
        self._said = ""

    def wait(self, error: redis.RedisError) -> None:
        """Sleep for the present backoff; raises ServerUnavailable where waiting cannot help or is given up."""
        why = transient_reason(error)
        if not why:
            raise ServerUnavailable(f"Redis refuses: {error}{_hint(error)}") from error
        if self._given_up():
            raise ServerUnavailable(f"told to stop while waiting for Redis: {why}") from error
        if why != self._said:
            log.warning("waiting for Redis", because=why)
            self._said = why
        longest = min(LONGEST_SECONDS, FIRST_SECONDS * 2.0**self._failures)
        self._failures += 1
        self._sleep(longest * (0.5 + self._jitter() / 2))

    def succeeded(self) -> None:
        if self._said:
            log.info("Redis is back")
        self._failures, self._said = 0, ""

    def call(self, operation: Callable[[], T]) -> T:
        """The result of `operation`, repeated until no outage is in its way; it must be safe to repeat."""
        while True:
            try:
                result = operation()
            except redis.RedisError as error:
                self.wait(error)
            else:
                self.succeeded()
                return result
