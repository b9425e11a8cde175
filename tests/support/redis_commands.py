"""Sends commands by their words, and reads what a test knows to be stored; redis-py types neither."""

from __future__ import annotations

from typing import Any

import redis


def execute(client: redis.Redis, *words: object) -> Any:
    """Send one command, and return the server's reply."""
    return client.execute_command(*words)  # type: ignore[no-untyped-call]


def stored(client: redis.Redis, key: str) -> bytes:
    """Return the string under the key; a key that does not exist fails the test."""
    value = client.get(key)
    assert isinstance(value, bytes), f"{key} is not stored"
    return value


def stored_field(client: redis.Redis, key: str, field: str) -> bytes:
    """Return the field of the hash under the key; a field that does not exist fails the test."""
    value = client.hget(key, field)
    assert isinstance(value, bytes), f"{key} has no {field}"
    return value
