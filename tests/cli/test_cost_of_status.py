"""What `fedqueue status` asks of Redis: it depends on the number of clients, and not on the length of the run."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import redis

from fedqueue.protocol.msgpack import pack_record
from fedqueue_coordinator.operator.embedded_server import EmbeddedServer
from fedqueue_coordinator.operator.runs import NEWEST_RECORDS
from tests.support.command_line import CommandLine
from tests.support.sample_run import SampleRun

SENT = "total_net_output_bytes"


def lengthen(run: SampleRun, client: redis.Redis, first: int, last: int) -> None:
    """Append the records of versions to the ledger, with one update each; all have the same size."""
    pipe = client.pipeline(transaction=False)
    for version in range(first, last):
        record = {"kind": "version", "version": 1_000_000 + version, "seconds": 1.0, "merged": [{"client": "c0"}]}
        pipe.xadd(run.coordinator.keys.ledger, {"record": pack_record(record)})
    pipe.execute()


def cost_of_status(call: CommandLine, server: EmbeddedServer, client: redis.Redis) -> tuple[Counter[str], int]:
    """Command → how often `fedqueue status` sends it, and the bytes of all answers."""
    client.config_resetstat()
    assert call("status", "--redis", server.url, "--json")[0] == 0
    sent: Any = client.info("stats")[SENT]
    stats: Any = client.info("commandstats")
    calls = {name.removeprefix("cmdstat_"): values["calls"] for name, values in stats.items()}
    own = {"config|resetstat", "info", "client|setinfo", "hello"}
    return Counter({name: count for name, count in calls.items() if name not in own}), sent


@pytest.mark.server
def test_status_costs_the_same_at_any_version(
    call: CommandLine, server: EmbeddedServer, server_client: redis.Redis
) -> None:
    run = SampleRun(server_client)
    run.join("c0")
    run.publish(1)
    lengthen(run, server_client, 1, NEWEST_RECORDS + 1)
    short = cost_of_status(call, server, server_client)
    lengthen(run, server_client, NEWEST_RECORDS + 1, 50_000)
    long = cost_of_status(call, server, server_client)
    assert short[0] == long[0]
    assert abs(short[1] - long[1]) < 200, "answers of the same size, but for digits"
    assert 10_000 < long[1] < 500 * NEWEST_RECORDS


@pytest.mark.server
def test_status_sends_two_commands_for_each_client(
    call: CommandLine, server: EmbeddedServer, server_client: redis.Redis
) -> None:
    run = SampleRun(server_client)
    run.publish(1)
    costs = []
    for clients in (range(10), range(10, 40)):
        for number in clients:
            run.join(f"c{number}")
        costs.append(sum(cost_of_status(call, server, server_client)[0].values()))
    assert costs[1] - costs[0] == 2 * 30


@pytest.mark.server
def test_sites_are_what_the_single_readings_say(server_client: redis.Redis) -> None:
    run = SampleRun(server_client)
    for name in ("a", "b", "gone", "large"):
        run.join(name)
    keys = run.coordinator.keys
    server_client.hset(keys.site("gone"), "alive", 1)
    server_client.hset(keys.site("large"), "alive", b"9" * 3_000_000)
    server_client.hset(keys.site("a"), "refused:closed", 2)
    server_client.hset(keys.site("b"), "refused:closed", "3")
    server_client.hset(keys.site("b"), "refused:attempt", "no number")
    store = run.coordinator
    assert store.sites() == (store.alive_clients(), store.refused())
    assert store.sites()[0] == ["a", "b"]
