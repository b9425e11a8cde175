"""Retries through an outage of Redis: which errors are transient, and how long to wait."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import TypeVar

import redis
import structlog

from fedqueue.errors import ServerUnavailable
from fedqueue.transport.connection import refusal

log = structlog.get_logger("fedqueue.transport.retry")

FIRST_SECONDS, LONGEST_SECONDS = 0.1, 5.0

T = TypeVar("T")

MORE_MEMORY = "raise its maxmemory, or lower dispatch.concurrency"

# Errors that end by themselves or with an operator's help, by the first word of their text.
TRANSIENT = {
    "OOM": f"it is out of memory: {MORE_MEMORY}",
    "READONLY": "it is a read-only replica: waiting for a new primary",
    "LOADING": "it is loading its data",
    "MASTERDOWN": "it is a replica whose primary is down",
    "MISCONF": "it cannot save to its disk: check the server's disk",
    "NOREPLICAS": "it has too few replicas",
    "CLUSTERDOWN": "the cluster is down",
    "TRYAGAIN": "the cluster is moving slots",
    "NOSCRIPT": "it has lost its scripts, which this user may not load: waiting for the coordinator to load them",
}
BY_TYPE = {  # redis-py removes the first word from the text of these
    redis.BusyLoadingError: "LOADING",
    redis.ReadOnlyError: "READONLY",
    redis.exceptions.NoScriptError: "NOSCRIPT",
}


def transient_reason(error: redis.RedisError) -> str:
    """Why the error is transient, in words; empty if waiting cannot help (a wrong password, a missing right)."""
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
    """Likely causes of a denied command; Redis's own error names neither the key nor its owner."""
    text = str(error)
    denied = isinstance(error, redis.exceptions.NoPermissionError) or "ACL failure" in text or "can't access" in text
    if not denied:
        return ""
    return (
        " (a worker's Redis user serves its own client only, a keeper's only the keeper of its name, and both run only "
        "the scripts of the version that wrote the rules: check --client or the keeper's NAME, or run `fedqueue acl` "
        "again)"
    )


class RedisRetry:
    """Repeats an operation through an outage, with backoff and jitter; logs each new reason once."""

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
        """Sleep for the present backoff; raises ServerUnavailable if waiting cannot help, or `given_up()` is true."""
        why = transient_reason(error)
        if not why:
            raise ServerUnavailable(f"Redis refuses: {refusal(error)}{_hint(error)}") from error
        if self._given_up():
            raise ServerUnavailable(f"stopped while waiting for Redis: {why}") from error
        if why != self._said:
            log.warning("waiting for Redis", because=why)
            self._said = why
        longest = min(LONGEST_SECONDS, FIRST_SECONDS * 2.0**self._failures)
        self._failures += 1
        self._sleep(longest * (0.5 + self._jitter() / 2))

    def succeeded(self) -> None:
        """Reset the backoff."""
        if self._said:
            log.info("Redis is back")
        self._failures, self._said = 0, ""

    def call(self, operation: Callable[[], T]) -> T:
        """The result of `operation`, which is repeated through an outage and must be safe to repeat."""
        while True:
            try:
                result = operation()
            except redis.RedisError as error:
                self.wait(error)
            else:
                self.succeeded()
                return result
