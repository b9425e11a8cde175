"""`fedqueue coordinator` and `fedqueue-worker` run as separate programs over a permanent Redis server."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedqueue.protocol.key_files import read_public_keys
from fedqueue.protocol.messages import read
from fedqueue.protocol.signed_envelope import SignedEnvelope
from fedqueue.transport.connection import connect
from fedqueue.transport.store import Store
from fedqueue_coordinator.operator.access.enrolment import enroll, revoke
from fedqueue_coordinator.operator.embedded_server import EmbeddedServer
from tests.support.ledger_checks import check_agreement
from tests.support.programs import Program, read_results
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.server, pytest.mark.timeout(600)]


def test_separate_parts_make_a_run_and_respect_retention(
    config: Path, start: Callable[..., Program], tmp_path: Path, redis_server: EmbeddedServer
) -> None:
    """Three workers accept every job; the policy of a fourth site refuses all of them."""
    (tmp_path / "policy.toml").write_text("min_examples = 97  # there are 96")
    reluctant = start(
        "fedqueue_worker", config, "--client", "client-3", "--policy", "policy.toml",
        FEDQUEUE_REDIS__URL=redis_server.url, FEDQUEUE_SECURITY__EGRESS_LOG="reluctant",
    )  # fmt: skip
    workers = [start("fedqueue_worker", config, FEDQUEUE_REDIS__URL=redis_server.url) for _ in range(3)]
    coordinator = start(
        "fedqueue_coordinator", "coordinator", config, "--redis", redis_server.url, "--output", "out",
        "--set", "clients.min_available=4",
    )  # fmt: skip
    assert coordinator.wait() == 0, coordinator.text
    assert [worker.wait() for worker in workers] == [0, 0, 0], workers[0].text
    summary, ledger = read_results(tmp_path / "out")
    check_agreement(summary, ledger)
    assert len(summary["clients"]) == 3, "not every worker claimed one partition"
    check_refusals(summary, ledger, tmp_path / "reluctant")
    assert reluctant.wait() == 0, reluctant.text
    client = connect(redis_server.url)
    left = {key.decode(): client.ttl(key) for key in client.scan_iter("fedqueue:{toy}:*")}
    sites = [f"site:client-{i}" for i in range(4)]
    kinds = sorted(key.removeprefix("fedqueue:{toy}:") for key in left)
    stored = ["clients", "config", "counts", "head", "leader", "ledger", "model:12:0", "model:12:1", *sites, "versions"]
    assert kinds == stored
    assert all(0 < ttl <= 24 * 3600 for ttl in left.values()), left
    rq_left = [k for k in client.scan_iter("rq:*") if client.ttl(k) < 0 and k not in (b"rq:workers", b"rq:queues")]
    assert rq_left == []


def check_refusals(summary: Any, ledger: Any, egress_log: Any) -> None:
    """Check that the site with a policy merged nothing, and that the ledger and the egress log have each refusal."""
    says = "min_examples: the client has 96, this site requires 97"
    refused = [record for record in ledger if record["kind"] == "abandoned" and record["reason"] == "refused"]
    assert {record["client"] for record in refused} == {"client-3"}
    assert all(says in record["error"] for record in refused)
    assert summary["abandoned_because"]["refused"] == len(refused) >= 1
    assert "client-3" not in summary["clients"]
    [log] = egress_log.iterdir()
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert lines[0]["what"] == "registration"
    ended = [line for line in lines if line["what"] == "refused"]
    assert {line["job"] for line in ended} >= {record["job"] for record in refused}
    assert all(says in line["text"] for line in ended)
    assert not [line for line in lines if line["what"] == "update"]


def test_next_coordinator_resumes_after_a_stop_and_key_rotation(
    config: Path, fork: Callable[..., Program], tmp_path: Path, redis_server: EmbeddedServer
) -> None:
    """Between the coordinators, a client's key and the coordinator's key are rotated; the worker is not restarted."""
    # Batches are slow, so that a heartbeat finds the new key before the run ends.
    long = (
        "--set",
        "stop.versions=60",
        "--set",
        "task.options.batch_seconds=0.005",
        "--set",
        "dispatch.lease_seconds=2",
    )
    keys, served = tmp_path / "keys", ("--partition", "0/4", "--client", "client-1")
    worker = fork("fedqueue_worker", config, *served, "--redis", redis_server.url, *long)
    first = fork("fedqueue_coordinator", "coordinator", config, "--redis", redis_server.url, *long)
    store = Store(connect(redis_server.url), "toy")
    wait_until(lambda: store.info().version >= 3, "three versions")
    enroll(keys, "client-1", site=keys, rotate=True)
    present = read_public_keys(keys / "clients" / "client-1.pub")[0].id
    wait_until(
        lambda: read(SignedEnvelope, store.signed_registrations()["client-1"]).key == present,
        "registered under the new key",
    )
    rotated = store.info().version
    wait_until(lambda: store.info().version >= rotated + 3, "what the former key signed is merged")
    revoke(keys, "client-1", previous=True)
    wait_until(lambda: store.info().version >= rotated + 5, "two more")
    first.send(signal.SIGTERM)
    assert first.wait() == 0, first.text
    enroll(keys, "coordinator", rotate=True)
    reached = store.info().version
    assert store.info().state == "running"
    second = fork("fedqueue_coordinator", "coordinator", config, "--redis", redis_server.url, *long, "--output", "out")
    assert second.wait() == 0, second.text
    assert f"version={reached}" in second.text
    summary, ledger = read_results(tmp_path / "out")
    check_agreement(summary, ledger)
    assert summary["versions"] == 60 > reached
    assert summary["updates_rejected"] == {}
    late = [line["client"] for record in ledger if record["kind"] == "version" for line in record["merged"]][-20:]
    assert {"client-0", "client-1"} <= set(late)
    assert worker.wait() == 0


def test_killed_worker_loses_only_its_job_and_is_replaced(
    config: Path, fork: Callable[..., Program], tmp_path: Path, redis_server: EmbeddedServer
) -> None:
    settings = ("--set", "clients.count=2", "--set", "task.options.batch_seconds=0.03", "--set", "stop.versions=30")
    url = ("--redis", redis_server.url)
    coordinator = fork("fedqueue_coordinator", "coordinator", config, *url, *settings, "--output", "out")
    workers = [fork("fedqueue_worker", config, *url, *settings) for _ in range(2)]
    store = Store(connect(redis_server.url), "toy")
    wait_until(lambda: store.info().version >= 2, "two versions")
    workers[0].send(signal.SIGKILL)
    workers[0].wait()
    wait_until(lambda: len(store.alive_clients()) == 1, "the dead worker's client is gone")
    replacement = fork("fedqueue_worker", config, *url, *settings)
    assert coordinator.wait() == 0, coordinator.text
    assert replacement.wait() == 0, replacement.text
    summary, ledger = read_results(tmp_path / "out")
    check_agreement(summary, ledger)
    assert summary["abandoned_because"].get("lapsed", 0) <= 1
    assert "served by" not in replacement.text


def test_worker_told_to_stop_hands_its_job_back_at_once(
    config: Path,
    start: Callable[..., Program],
    fork: Callable[..., Program],
    tmp_path: Path,
    redis_server: EmbeddedServer,
) -> None:
    settings = ("--set", "task.options.batch_seconds=0.5", "--set", "training.local_epochs=100")
    url = ("--redis", redis_server.url)
    coordinator = fork("fedqueue_coordinator", "coordinator", config, *url, *settings, "--output", "out")
    alone = fork("fedqueue_worker", config, *url, *settings, "--client", "client-0")
    two = ("--processes", 2, "--client", "client-1", "--client", "client-2")
    parent = start("fedqueue_worker", config, *url, *settings, *two)
    store = Store(connect(redis_server.url), "toy")
    attempts = store.keys.attempt("*")
    wait_until(
        lambda: sum(store.redis.hget(key, "number") == b"1" for key in store.redis.scan_iter(attempts)) == 3,
        "three jobs in training",
    )
    for program in (alone, parent):
        program.send(signal.SIGTERM)
    assert alone.wait() == 0, alone.text
    assert parent.wait() == 0, parent.text

    def returned() -> Any:
        return {r["client"] for r in store.ledger() if r["kind"] == "abandoned" and r["reason"] == "returned"}

    wait_until(lambda: returned() == {"client-0", "client-1", "client-2"}, "hand-backs")
    coordinator.send(signal.SIGINT)
    assert coordinator.wait() == 130, coordinator.text


def test_once_ends_after_a_job_and_clients_are_exclusive(
    config: Path, fork: Callable[..., Program], redis_server: EmbeddedServer
) -> None:
    url = ("--redis", redis_server.url)
    coordinator = fork("fedqueue_coordinator", "coordinator", config, *url, "--set", "stop.versions=1000")
    lasting = fork("fedqueue_worker", config, *url, "--client", "client-2")
    store = Store(connect(redis_server.url), "toy")
    wait_until(lambda: "client-2" in store.alive_clients(), "client-2 is served")
    second = fork("fedqueue_worker", config, *url, "--client", "client-2")
    assert second.wait() == 1
    assert "client client-2 is served by another worker" in second.text
    once = fork("fedqueue_worker", config, *url, "--partition", "3/4", "--max-jobs", 1)
    assert once.wait() == 0, once.text
    status = subprocess.run(
        [sys.executable, "-m", "fedqueue_coordinator", "status", "--redis", redis_server.url, "--json"],
        capture_output=True, text=True, check=True, env=dict(os.environ),
    )  # fmt: skip
    shown = json.loads(status.stdout)
    assert shown["state"] == "running"
    assert shown["clients_alive"] == ["client-2"]
    for program in (lasting, coordinator):
        program.send(signal.SIGINT)
    assert lasting.wait() == 0
    assert coordinator.wait() == 130
