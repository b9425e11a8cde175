"""Which errors of Redis are transient, and how operations are retried."""

from __future__ import annotations

from typing import Any

import pytest
import redis
from redis import exceptions

from fedqueue.errors import ServerUnavailable
from fedqueue.transport.retry import FIRST_SECONDS, LONGEST_SECONDS, RedisRetry, transient_reason


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (redis.ConnectionError("Connection refused."), "does not answer (Connection refused.)"),
        (redis.TimeoutError("Timeout reading from socket"), "does not answer"),
        (redis.BusyLoadingError("Redis is loading the dataset in memory"), "loading its data"),
        (redis.ReadOnlyError("You can't write against a read only replica."), "read-only replica"),
        (exceptions.OutOfMemoryError("command not allowed when used memory > 'maxmemory'."), "out of memory"),
        (redis.ResponseError("MISCONF Redis is configured to save RDB snapshots"), "cannot save"),
        (redis.ResponseError("NOREPLICAS Not enough good replicas to write."), "too few replicas"),
    ],
)
def test_transient_error_has_a_reason_for_waiting(error: Any, words: str) -> None:
    assert words in transient_reason(error)


@pytest.mark.parametrize(
    "error",
    [
        redis.AuthenticationError("invalid username-password pair or user is disabled."),
        exceptions.NoPermissionError("this user has no permissions to run the 'get' command"),
        redis.ResponseError("WRONGTYPE Operation against a key holding the wrong kind of value"),
        redis.ResponseError("ERR unknown command"),
    ],
)
def test_permanent_error_is_raised_at_once_as_one_line(error: Any) -> None:
    assert transient_reason(error) == ""
    with pytest.raises(ServerUnavailable, match="Redis refuses"):
        RedisRetry(sleep=lambda seconds: pytest.fail("it slept")).wait(error)


def test_operation_is_retried_with_growing_pauses() -> None:
    slept: list[float] = []
    attempts = iter([redis.ConnectionError("gone")] * 8 + [None])

    def operation() -> str:
        if (error := next(attempts)) is not None:
            raise error
        return "done"

    assert RedisRetry(sleep=slept.append, jitter=lambda: 1.0).call(operation) == "done"
    assert slept == [FIRST_SECONDS * 2**k for k in range(6)] + [LONGEST_SECONDS] * 2


def test_retry_pauses_are_jittered_and_reset_after_success() -> None:
    slept: list[float] = []
    retry = RedisRetry(sleep=slept.append, jitter=lambda: 0.0)
    for _ in range(3):
        retry.wait(redis.ConnectionError("gone"))
    retry.succeeded()
    retry.wait(redis.ConnectionError("gone"))
    assert slept == [FIRST_SECONDS / 2, FIRST_SECONDS, FIRST_SECONDS * 2, FIRST_SECONDS / 2]


def test_waiting_ends_on_a_stop_request() -> None:
    retry = RedisRetry(given_up=lambda: True, sleep=lambda seconds: pytest.fail("it slept"))
    with pytest.raises(ServerUnavailable, match="stopped while waiting"):
        retry.wait(redis.ConnectionError("gone"))
