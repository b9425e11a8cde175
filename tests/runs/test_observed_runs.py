"""Metrics of real processes, scraped over HTTP while a run is under way."""

from __future__ import annotations

import socket
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("prometheus_client")

from prometheus_client.parser import text_string_to_metric_families

from fedqueue_coordinator.operator.embedded_server import EmbeddedServer
from tests.support.programs import Program, read_results
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.server, pytest.mark.timeout(300)]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def scrape(port: int) -> dict[str, float]:
    """Name → sum over its series; empty while nothing answers."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            text = answer.read().decode()
    except OSError:
        return {}
    sums: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            sums[sample.name] = sums.get(sample.name, 0.0) + sample.value
    return sums


def test_one_address_shows_coordinator_and_both_workers(
    config: Path, start: Callable[..., Program], tmp_path: Path
) -> None:
    port = free_port()
    program = start(
        "fedqueue_coordinator", "run", config, "-n", 2, "-o", "out", "--metrics", port,
        "-s", "stop.versions=40", "-s", "clients.slowdown={client-0=5, client-1=5, client-2=5, client-3=5}",
    )  # fmt: skip
    seen = wait_until(lambda: s if (s := scrape(port)).get("fedqueue_worker_jobs_total", 0) > 8 else {}, "updates")
    assert seen["fedqueue_version"] >= 1
    assert seen["fedqueue_updates_merged_total"] >= 2
    assert seen["fedqueue_worker_phase"] == 2, "both processes are in a phase"
    with socket.create_connection(("127.0.0.1", port)) as scraper:  # which is killed in the middle of a request
        scraper.sendall(b"GET /metrics HTTP/1.1\r\nHo")
    assert program.wait() == 0, program.text
    assert read_results(tmp_path / "out")[0]["versions"] == 40
    assert not scrape(port)


def test_port_in_use_is_one_line_before_the_run(config: Path, start: Callable[..., Program], tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        program = start("fedqueue_coordinator", "run", config, "-o", "out", "--metrics", port)
        assert program.wait() != 0
    assert len(program.text.strip().splitlines()) == 1
    assert str(port) in program.text
    assert "cannot listen there" in program.text
    assert not (tmp_path / "out" / "redis").exists()


def test_coordinator_and_worker_have_own_addresses(
    config: Path, start: Callable[..., Program], server: EmbeddedServer
) -> None:
    first, second = free_port(), free_port()
    words = (config, "-u", server.url, "-s", "stop.versions=60", "--metrics")
    slow = ("-s", "clients.slowdown={client-0=5, client-1=5, client-2=5, client-3=5}")
    coordinator = start("fedqueue_coordinator", "coordinator", *words, first)
    clients = [word for number in range(4) for word in ("--client", f"client-{number}")]
    site = start("fedqueue_worker", *words, second, *slow, "--processes", 2, *clients)
    seen = wait_until(lambda: s if (s := scrape(second)).get("fedqueue_worker_jobs_total", 0) > 8 else {}, "updates")
    assert "fedqueue_version" not in seen
    assert scrape(first)["fedqueue_updates_merged_total"] >= 2
    assert not [name for name in scrape(first) if name.startswith("fedqueue_worker")]
    assert seen["fedqueue_worker_phase"] == 2
    assert coordinator.wait() == 0, coordinator.text
    assert site.wait() == 0, site.text
