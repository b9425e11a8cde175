"""During an outage of Redis or the loss of a coordinator, the run waits, logs the reason, and continues."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import redis

import fedqueue.tensors.blobs
from fedqueue.protocol.messages import Update
from fedqueue.tensors.blobs import chunks_of
from fedqueue.transport.connection import connect
from fedqueue.transport.retry import RedisRetry
from fedqueue.transport.worker_store import Claim, WorkerStore
from fedqueue_coordinator.operator.audit.audit import audit, ok
from fedqueue_coordinator.operator.audit.audit_input import read_audit_input
from fedqueue_coordinator.service.checkpoint import load_checkpoint
from fedqueue_coordinator.service.coordinator_store import CoordinatorStore
from tests.support.chaos import worker_with_skew
from tests.support.chaos.arena import LEADER_SECONDS, RUN, Chaos
from tests.support.chaos.fleet import Member
from tests.support.forked import warm_up
from tests.support.tcp_proxy import TcpProxy
from tests.support.tcp_server import TcpServer

pytestmark = [pytest.mark.slow, pytest.mark.server, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def chaos(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chaos]:
    """A running federation, shared by the tests of this module."""
    warm_up()
    running = Chaos(tmp_path_factory.mktemp("outages"), seed=0)
    running.wait(lambda: running.version() >= 2, "the first versions", 90)
    yield running
    running.close()


def deaths(chaos: Chaos) -> list[int]:
    """Restarts of each worker. Coordinators are not counted: one may end because the standby took the lead."""
    return [one.restarts for one in chaos.fleet.workers]


def check_books(chaos: Chaos) -> None:
    chaos.fleet.stop_all()
    try:
        checks = audit(chaos.audit_input())
    finally:
        chaos.fleet.continue_all()
    assert ok(checks), checks


def goes_on(chaos: Chaos) -> None:
    reached = chaos.version()
    chaos.wait(lambda: chaos.version() >= max(0, reached) + 3, "three more versions")


def said(chaos: Chaos, what: str) -> bool:
    return any(what in one.log.read_text(errors="replace") for one in chaos.fleet.coordinators)


def test_server_that_is_absent_for_seconds_is_waited_for(chaos: Chaos) -> None:
    before = deaths(chaos)
    chaos.server.kill()
    back = time.monotonic() + 4
    chaos.wait(lambda: time.monotonic() > back, "four seconds pass")
    chaos.server.start()
    goes_on(chaos)
    assert deaths(chaos) == before, "a worker died instead of waiting"
    check_books(chaos)


def test_server_out_of_memory_is_waited_for(chaos: Chaos) -> None:
    goes_on(chaos)
    before, client = deaths(chaos), chaos.server.client()
    client.config_set("maxmemory-policy", "noeviction")
    client.config_set("maxmemory", 1)
    chaos.wait(lambda: said(chaos, "out of memory: raise its maxmemory"), "the coordinator says what it waits for")
    reached = chaos.version()
    client.config_set("maxmemory", 0)
    chaos.wait(lambda: chaos.version() >= reached + 3, "three more versions")
    assert deaths(chaos) == before
    check_books(chaos)
    client.close()


def test_stopped_coordinator_hands_the_lead_to_the_standby(chaos: Chaos) -> None:
    chaos.calm()
    leader = chaos.leader()
    assert leader is not None
    assert leader.process is not None
    process, reached, told = leader.process, chaos.version(), time.monotonic()
    leader.send(signal.SIGTERM)
    chaos.wait(lambda: not process.is_alive(), "it ends")
    assert process.exitcode == 0
    chaos.wait(lambda: chaos.version() > reached + 1, "its successor commits")
    sys.stdout.write(f"from SIGTERM to the successor's second commit: {time.monotonic() - told:.2f} s\n")
    check_books(chaos)


def test_standby_commits_soon_after_the_leader_was_killed(chaos: Chaos) -> None:
    chaos.calm()
    leader = chaos.leader()
    assert leader is not None
    token = int(chaos.store.redis.hget(chaos.store.keys.leader, "token") or 0)
    killed = time.monotonic()
    leader.send(signal.SIGKILL)
    chaos.wait(lambda: int(chaos.store.redis.hget(chaos.store.keys.head, "token") or 0) > token, "a commit")
    seconds = time.monotonic() - killed
    sys.stdout.write(f"from kill -9 to the standby's first commit: {seconds:.2f} s\n")
    assert seconds < LEADER_SECONDS + 5  # margin for a loaded machine; on an idle one it is about leader_lease_seconds
    check_books(chaos)


def test_wrong_password_is_one_clear_line_and_exit_1(chaos: Chaos, tmp_path: Path) -> None:
    (tmp_path / "password").write_text("haddock")
    url = chaos.server.address_through(chaos.server.port)
    wrong = f"redis.password_file={tmp_path / 'password'}"
    arguments = [str(chaos.folder / "federation.toml"), "--redis", url, "--set", wrong]
    stranger = Member("stranger", worker_with_skew.main, arguments, tmp_path / "stranger.log")
    stranger.start()
    assert stranger.process is not None
    stranger.process.join(60)
    (line,) = stranger.log.read_text().splitlines()
    assert stranger.process.exitcode == 1
    assert line.startswith("fedqueue: no Redis at redis://127.0.0.1")
    assert "password" in line
    assert "haddock" not in line


def test_lost_redis_data_is_restored_from_the_checkpoint(chaos: Chaos) -> None:
    chaos.calm()
    checkpoints = [chaos.folder / f"out-{i}" / "unfinished" / "checkpoint.safetensors" for i in (0, 1)]
    leader = chaos.leader()
    assert leader is not None
    place = checkpoints[chaos.fleet.coordinators.index(leader)]
    stale = place.stat().st_mtime_ns if place.exists() else 0
    chaos.wait(lambda: place.exists() and place.stat().st_mtime_ns > stale, "a checkpoint")
    chaos.wait(lambda: any(job.attempt for job in chaos.store.jobs()), "a job in training")
    job = next(job for job in chaos.store.jobs() if job.attempt)
    straggler = Claim(job.job, job.attempt, chaos.version(), chaos.store.info().epoch)
    chaos.fleet.stop_all()  # so that no coordinator saves another checkpoint before the data are lost
    for other in checkpoints:
        if other != place:  # saved perhaps after an outage, when every lease had expired and no job was open
            other.unlink(missing_ok=True)
    saved = load_checkpoint(place)
    assert saved is not None
    chaos.server.client().flushall()
    chaos.fleet.continue_all()
    chaos.wait(lambda: chaos.store.exists() and chaos.store.info().epoch == 1, "a new epoch")
    payload = np.zeros(344, np.uint8)
    late = WorkerStore(chaos.store.redis, RUN, "straggler")
    assert late.post(straggler, Update(examples=96, nbytes=344, chunks=1, seconds=0.1), payload) == "old_epoch"
    goes_on(chaos)
    assert set(chaos.store.alive_clients()) == {"client-0", "client-1", "client-2", "client-3"}
    ledger = chaos.store.ledger()
    assert [r["epoch"] for r in ledger if r["kind"] == "epoch"] == [1]
    lost = {r["job"]: r["client"] for r in ledger if r.get("reason") == "epoch_lost"}
    assert lost == saved.unfinished
    assert lost
    check_books(chaos)
    results = chaos.end()  # a run that lost the payloads of its first epoch can still be ended
    assert ok(audit(read_audit_input(str(results), "")))


def test_read_only_replica_is_waited_for_until_it_is_promoted(tmp_path: Path) -> None:
    warm_up()
    chaos = Chaos(tmp_path, seed=0)
    replica = TcpServer(tmp_path / "replica", replicaof=f"127.0.0.1 {chaos.server.port}")
    try:
        chaos.wait(lambda: chaos.version() >= 2, "the first versions", 90)
        with replica.client() as client:
            chaos.wait(lambda: client.info("replication")["master_link_status"] == "up", "replication")
            chaos.proxy.retarget(replica.port)
            chaos.wait(lambda: said(chaos, "read-only replica"), "the coordinator says what it waits for")
            chaos.server.kill()
            client.replicaof("NO", "ONE")
        chaos.store.redis.close()
        chaos.store = CoordinatorStore(connect(replica.url, retries=0), RUN, "spectator")
        goes_on(chaos)
        assert deaths(chaos) == [0] * 3
        chaos.server, replica = replica, chaos.server
        check_books(chaos)
    finally:
        chaos.close()
        replica.kill()


@pytest.mark.parametrize("direction", ["post", "fetch"])
def test_connection_cut_in_the_middle_of_a_chunk_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, direction: str
) -> None:
    monkeypatch.setattr(fedqueue.tensors.blobs, "CHUNK", 1_000_000)
    server = TcpServer(tmp_path)
    proxy = TcpProxy(server.port)
    client = connect(server.url_through(proxy.port))
    try:
        store = WorkerStore(client, "run", "worker")
        sent = np.random.default_rng(0).integers(0, 256, 3_500_000).astype(np.uint8)
        received = np.zeros_like(sent)
        retry = RedisRetry()
        for cut in (10, 700_000, 1_000_050, 2_200_000, 3_400_000):
            proxy.cut_after(cut if direction == "post" else sent.nbytes * 2)
            chunks = retry.call(lambda: store.write_blob("blob", sent))
            assert chunks == chunks_of(sent.nbytes) == 4
            if direction == "fetch":
                proxy.cut_after(cut)
            retry.call(lambda: store.read_blob("blob", received))
            assert np.array_equal(sent, received)
        assert proxy.cuts == 5
    finally:
        client.close()
        proxy.stop()
        server.kill()


def test_client_that_gives_up_at_once_sees_the_cut(tmp_path: Path) -> None:
    """The proxy cuts the connection: without retries the command fails."""
    server = TcpServer(tmp_path)
    proxy = TcpProxy(server.port)
    client = redis.Redis.from_url(server.url_through(proxy.port), retry=redis.retry.Retry(redis.backoff.NoBackoff(), 0))
    try:
        proxy.cut_after(1000)
        with pytest.raises(redis.ConnectionError):
            client.set("k", bytes(5000))
    finally:
        client.close()
        proxy.stop()
        server.kill()
