"""Waits for a condition that depends on another process or thread."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import redis

from fedqueue.errors import RunNotFound

TIMEOUT_SECONDS = 240.0  # an import of torch is slow on a loaded machine
POLL_SECONDS = 0.02

T = TypeVar("T")


def wait_until(condition: Callable[[], T], what: str, seconds: float = TIMEOUT_SECONDS) -> T:
    """Return the first truthy value of `condition`; a Redis error or a missing file or run counts as false."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(redis.RedisError, RunNotFound, FileNotFoundError):
            if value := condition():
                return value
        time.sleep(POLL_SECONDS)
    raise AssertionError(f"not within {seconds} s: {what}")


def alive(pid: int) -> bool:
    """Whether the process exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until_ended(pids: list[int]) -> None:
    """Wait for the end of all these processes; a failure names those that still run."""
    try:
        wait_until(lambda: not any(map(alive, pids)), "the processes end")
    except AssertionError as error:
        left = {pid: Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ") for pid in pids if alive(pid)}
        raise AssertionError(f"{error}; left: {left}") from None
