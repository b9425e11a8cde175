"""A server that accepts connections and does not answer, such as one that is stopped or swaps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import redis
import structlog
from redis.backoff import NoBackoff

from fedqueue.transport.connection import SharedRetry


def answering_after(failures: list[Exception]) -> Callable[[], str]:
    def command() -> str:
        if failures:
            raise failures.pop(0)
        return "PONG"

    return command


def called(retry: SharedRetry, *failures: Exception) -> list[tuple[str, str]]:
    """Return level and event of what is logged while a command fails so often, and then is answered."""
    seen: list[Exception] = []
    with structlog.testing.capture_logs() as logs:
        assert retry.call_with_retry(answering_after([*failures]), seen.append) == "PONG"
    assert len(seen) == len(failures)
    return [(line["log_level"], line["event"].partition(":")[0]) for line in logs]


@pytest.fixture
def retry() -> SharedRetry:
    return SharedRetry(NoBackoff(), 6)


def test_silence_is_warned_of_once(retry: SharedRetry) -> None:
    structlog.configure()
    silence = redis.TimeoutError("Timeout reading from socket")
    said = called(retry, silence, silence, silence)
    assert said == [("warning", "Redis accepts connections and does not answer"), ("info", "Redis answers again")]
    assert called(retry) == []
    assert called(retry, silence) == said


def test_broken_connection_is_retried_without_a_warning(retry: SharedRetry) -> None:
    structlog.configure()
    assert called(retry, redis.ConnectionError("Connection reset by peer")) == []


def test_command_without_logs_says_nothing(retry: SharedRetry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(structlog, "is_configured", lambda: False)
    assert called(retry, redis.TimeoutError("Timeout reading from socket")) == []


def test_failure_count_is_passed_on(retry: SharedRetry) -> None:
    counts: list[Any] = []
    errors: list[Exception] = [redis.TimeoutError("late"), redis.TimeoutError("late")]
    retry.call_with_retry(answering_after(errors), lambda error, count: counts.append(count), with_failure_count=True)
    assert counts == [1, 2]
