"""Fixtures of tests that run a worker in the process of the test."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import pytest
import structlog
import torch


@pytest.fixture
def logs() -> Iterator[list[Any]]:
    """The log entries of the test, which are not printed."""
    with structlog.testing.capture_logs() as captured:
        yield captured


@pytest.fixture
def process_restored() -> Iterator[None]:
    """Put back the signal handlers and the number of threads that a worker sets."""
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    for signum, handler in handlers.items():
        signal.signal(signum, handler)
