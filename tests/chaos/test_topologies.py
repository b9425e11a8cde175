"""The same steps on real servers in two topologies: Redis with Sentinel failover, and a Redis cluster."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import redis

from fedqueue.protocol.messages import Ending, Order
from fedqueue.transport.connection import connect
from fedqueue.transport.retry import RedisRetry
from fedqueue.transport.rq_jobs import RqJobRecord
from fedqueue_coordinator.operator import child_processes
from fedqueue_coordinator.operator.embedded_server import find_server
from tests.support.redis_commands import execute
from tests.support.sample_run import SampleRun
from tests.support.tcp_server import PASSWORD, TcpServer, free_port
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.server]


class OneSlotRun(SampleRun):
    """A run whose RQ jobs use the run's slot: RQ's own keys are in several, which a cluster's script may not touch."""

    def record(self, order: Order) -> RqJobRecord:
        return replace(super().record(order), key=f"rq:{{sample}}:{order.job}", queue="rq:{sample}")


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[redis.Redis]:
    """A cluster of one node, which refuses a script that touches two slots, as a larger cluster does."""
    server = TcpServer(tmp_path, **{"cluster-enabled": "yes", "cluster-port": str(free_port())})
    client = server.client()
    execute(client, "CLUSTER", "ADDSLOTSRANGE", 0, 16383)
    wait_until(lambda: b"cluster_state:ok" in execute(client, "CLUSTER", "INFO"), "the cluster is up")
    yield client
    client.close()
    server.stop()


def test_every_step_of_a_run_touches_one_slot_of_a_cluster(cluster: redis.Redis) -> None:
    with pytest.raises(redis.ResponseError, match=r"(?i)slot"):
        cluster.eval("return redis.call('GET', KEYS[1])", 2, "a", "b")
    run = OneSlotRun(cluster)
    worker = run.join()
    run.posted(1)
    run.publish(1, run.updates())
    claim = worker.claim(run.dispatch(2), 60)
    worker.fetch(claim.version, run.payload())
    worker.release_base(claim)
    assert worker.heartbeat(["c0"], 60, claim, progressing=True).owns_job
    assert worker.end(claim, Ending(reason="returned")) == ""
    entry = run.coordinator.unacknowledged()[-1]
    assert run.coordinator.close(claim.job, {"kind": "abandoned"}, 1, entry.id)
    run.coordinator.renew_lead(60)
    assert run.coordinator.find_expired() == []
    run.coordinator.expire_clients(["c0"])
    worker.leave(["c0"])
    for entry in run.coordinator.unacknowledged():
        run.coordinator.ack([(entry.id, None)])
    run.coordinator.end("all done", 60, 1)
    assert [r["kind"] for r in run.coordinator.ledger()] == ["version", "abandoned"]
    scheduler = {execute(cluster, "CLUSTER", "KEYSLOT", key) for key in cluster.scan_iter(run.keys.pattern)}
    assert len(scheduler) == 1


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[tuple[str, TcpServer, TcpServer]]:
    """Yield URL, primary and replica; one sentinel promotes the replica a second after the primary's death."""
    primary = TcpServer(tmp_path / "primary")
    replica = TcpServer(tmp_path / "replica", replicaof=f"127.0.0.1 {primary.port}")
    port = free_port()
    settings = tmp_path / "sentinel.conf"
    settings.write_text(
        f"port {port}\nbind 127.0.0.1\ndir {tmp_path}\nsentinel monitor fed 127.0.0.1 {primary.port} 1\n"
        f"sentinel auth-pass fed {PASSWORD}\nsentinel down-after-milliseconds fed 1000\n"
        "sentinel failover-timeout fed 3000\n"
    )
    sentinel = child_processes.start([find_server(), str(settings), "--sentinel"], tmp_path / "sentinel.log")
    asked = redis.Redis(port=port)
    wait_until(lambda: _knows_a_replica(asked), "the sentinel knows the replica")
    asked.close()
    yield f"sentinel://:{PASSWORD}@127.0.0.1:{port}/fed", primary, replica
    child_processes.stop([sentinel])
    replica.stop()
    primary.stop()


def _knows_a_replica(sentinel: redis.Redis) -> bool:
    try:
        return bool(sentinel.sentinel_slaves("fed"))
    except redis.RedisError:
        return False


def test_run_goes_on_at_the_replica_that_sentinel_promotes(watched: tuple[str, TcpServer, TcpServer]) -> None:
    url, primary, replica = watched
    run = SampleRun(connect(url))
    worker = run.join()
    claim = worker.claim(run.dispatch(), 60)
    assert run.client.wait(1, 10_000) == 1, "the replica did not acknowledge the write"
    primary.kill()
    retry = RedisRetry()
    assert retry.call(lambda: run.post(worker, claim)) == ""
    assert retry.call(lambda: run.publish(1, run.updates())) == {1}
    with replica.client() as promoted:
        assert promoted.info("replication")["role"] == "master"
    assert run.coordinator.info().version == 1
    run.client.connection_pool.disconnect()
