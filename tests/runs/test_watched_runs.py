"""A run whose watchers are killed in its midst: a page with a reader, a tracker, and a scraper of metrics."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("prometheus_client")
pytest.importorskip("starlette")

from fedqueue.transport.connection import connect
from fedqueue.transport.store import Store
from fedqueue_coordinator.operator.audit.audit import audit
from fedqueue_coordinator.operator.audit.audit_input import read_audit_input
from fedqueue_coordinator.operator.embedded_server import EmbeddedServer
from tests.runs.test_observed_runs import free_port
from tests.support.programs import Program
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.server, pytest.mark.timeout(300)]

TRACKER = """
from fedqueue import RunHooks

class Log(RunHooks):
    def on_version(self, record):
        with open("tracked", "a") as log:
            print(record["version"], file=log)
"""
READER = """
import sys, time, urllib.request
while True:
    try:
        with urllib.request.urlopen(sys.argv[1], timeout=60) as answer:
            for line in answer:
                print(line[:20], flush=True)
    except OSError:
        time.sleep(0.1)
"""


def shown_version(address: str) -> int:
    """The version that the page shows; -1 while nothing answers."""
    try:
        with urllib.request.urlopen(f"{address}/api/runs/toy", timeout=10) as answer:
            return int(json.load(answer)["version"])
    except OSError:
        return -1


def shown_in_redis(url: str) -> int:
    """The newest version of the run."""
    client = connect(url)
    version = Store(client, "toy").info().version
    client.close()
    return version


def started_reader(url: str, log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as output:
        return subprocess.Popen([sys.executable, "-c", READER, url], stdout=output)


def test_killed_watchers_change_no_bit(
    config: Path,
    start: Callable[..., Program],
    fork: Callable[..., Program],
    tmp_path: Path,
    redis_server: EmbeddedServer,
) -> None:
    (tmp_path / "tracker.py").write_text(TRACKER)
    metrics, page = free_port(), free_port()
    address = f"http://127.0.0.1:{page}"
    slow = ("-s", "task.options.batch_seconds=0.03")
    coordinator = fork(
        "fedqueue_coordinator", "coordinator", config, "-u", redis_server.url, "-o", "out", "--metrics", metrics,
        "-s", "stop.versions=100000", "-s", "ledger.keep_payloads=true", *slow,
    )  # fmt: skip
    clients = [word for i in range(4) for word in ("--client", f"client-{i}")]
    site = fork("fedqueue_worker", config, "-u", redis_server.url, "--processes", 2, *clients, *slow)
    wait_until(lambda: "version" in coordinator.text, "the run has begun")
    dashboard = start(
        "fedqueue_coordinator", "dashboard", "toy", "-u", redis_server.url, "--address", f"127.0.0.1:{page}"
    )
    tracker = start("fedqueue_coordinator", "track", "toy", "-u", redis_server.url, "--to", "tracker.py:Log")
    readers = [
        started_reader(f"{address}/api/runs/toy/events", tmp_path / "pages"),
        started_reader(f"http://127.0.0.1:{metrics}/metrics", tmp_path / "scrapes"),
    ]
    try:
        wait_until(lambda: shown_version(address) > 0, "the page shows versions")
        wait_until((tmp_path / "tracked").exists, "the tracker has a version")
        wait_until(lambda: all((tmp_path / name).stat().st_size for name in ("pages", "scrapes")), "both readers read")
    finally:
        for reader in readers:
            reader.kill()
            reader.wait()
    for watcher in (dashboard, tracker):
        watcher.send(signal.SIGKILL)
        assert watcher.wait() == -signal.SIGKILL, watcher.text
    killed_at = shown_in_redis(redis_server.url)
    wait_until(lambda: shown_in_redis(redis_server.url) >= killed_at + 5, "five more versions are made")
    for program in (coordinator, site):
        program.send(signal.SIGTERM)
        assert program.wait() == 0, program.text
    checks = audit(read_audit_input("toy", redis_server.url, tmp_path / "keys"))
    assert not [problem for check in checks for problem in check.problems]
    [replayed] = [check for check in checks if check.invariant.startswith("replaying the ledger")]
    assert replayed.checked
    assert not replayed.skipped
