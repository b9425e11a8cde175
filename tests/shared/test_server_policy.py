"""What a server's refusal means, and a server that deletes keys when its memory is full."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
import structlog
import torch

from fedqueue.config.loading import parse_config
from fedqueue.errors import RunLost, ServerUnavailable
from fedqueue.tensors.manifest import Manifest
from fedqueue.transport.connection import check, eviction, eviction_note, refusal
from fedqueue_coordinator.service.memory_watch import MemoryWatch


@pytest.fixture
def logs() -> Iterator[list[Any]]:
    with structlog.testing.capture_logs() as logs:
        yield logs


CONFIG = parse_config({"task": {"entrypoint": "t:T"}, "clients": {"count": 4}, "stop": {"versions": 1}})
MANIFEST = Manifest.from_module(torch.nn.Linear(1000, 250))  # 1 MB


class Server(redis.Redis):
    """Answers INFO and PING."""

    def __init__(self, policy: str = "allkeys-lru", limit: int = 0, evicted: int = 0, error: Any = None) -> None:
        self.policy, self.limit, self.evicted, self.error = policy, limit, evicted, error

    def info(self, section: Any = None, *others: Any, **options: Any) -> dict[str, Any]:
        if self.error:
            raise self.error
        if section == "memory":
            return {"maxmemory": self.limit, "maxmemory_policy": self.policy}
        return {"evicted_keys": self.evicted}

    def ping(self, **options: Any) -> Any:
        raise self.error


@pytest.mark.parametrize(
    ("answer", "meaning"),
    [
        ("HELLO must be called with the client already authenticated, otherwise the HELLO <proto> AUTH …", "password"),
        ("NOAUTH Authentication required.", "it wants a password, and none was given"),
        ("Authentication required.", "redis.password_file"),
        ("WRONGPASS invalid username-password pair or user is disabled.", "the user or the password is wrong"),
        ("AUTH <password> called without any password configured for the default user", "it has no password"),
        ("DENIED Redis is running in protected mode because\nprotected mode is enabled", "it is in protected mode"),
        ("unknown command 'SCRIPT', with args beginning with: 'LOAD' '-- Claims", "it has no command SCRIPT, which"),
        ("unknown command `blmove`, with args beginning with: ", "it has no command BLMOVE"),
        (
            "Command # 1 (SCRIPT LOAD -- (a) of pipe\n) of pipeline caused error: unknown command 'X', with",
            "it has",
        ),
        ("Command # 2 (GET (a)\n b) of pipeline caused error: no memory", "no memory"),
        ("Connection refused\n  twice", "Connection refused twice"),
    ],
)
def test_refusal_says_what_to_do(answer: str, meaning: str) -> None:
    assert meaning in refusal(redis.RedisError(answer))
    with pytest.raises(ServerUnavailable, match="no Redis at redis://h: "):
        check(Server(error=redis.RedisError(answer)), "redis://h")


def test_server_with_too_little_memory_for_the_run_is_refused() -> None:
    with pytest.raises(ServerUnavailable, match=r"allkeys-lru, maxmemory 5.0 MB\), and this run needs 6.0 MB"):
        MemoryWatch(Server(limit=5_000_000)).check_policy(CONFIG, MANIFEST)


@pytest.mark.parametrize("policy", ["allkeys-lfu", "volatile-lru", "volatile-ttl"])
def test_server_that_may_delete_keys_is_warned_of_once(policy: str) -> None:
    watch = MemoryWatch(Server(policy, limit=50_000_000))
    with structlog.testing.capture_logs() as logs:
        watch.check_policy(CONFIG, MANIFEST)
        watch.check_policy(CONFIG, MANIFEST)
    [warning] = logs
    assert warning["log_level"] == "warning"
    assert f"maxmemory-policy {policy}" in warning["because"]
    assert "set maxmemory-policy to noeviction" in warning["because"]


def test_server_with_less_memory_than_needed_is_warned_of(logs: list[Any]) -> None:
    MemoryWatch(Server("noeviction", limit=5_000_000)).check_policy(CONFIG, MANIFEST)
    [warning] = logs
    assert warning["because"].startswith("this run needs 6.0 MB, and maxmemory is 5.0 MB: raise its maxmemory")


@pytest.mark.parametrize(
    "server",
    [
        Server("noeviction", limit=50_000_000),
        Server("allkeys-lru", limit=0),
        Server(error=redis.exceptions.NoPermissionError("no INFO for this user")),
    ],
    ids=["noeviction", "unlimited", "no-right"],
)
def test_other_servers_are_not_warned_of(server: Server) -> None:
    with structlog.testing.capture_logs() as logs:
        MemoryWatch(server).check_policy(CONFIG, MANIFEST)
    assert not logs
    assert eviction(server)[0] == ""
    assert eviction_note(server) == ""


# A server that fills up


class Filling(redis.Redis):
    """Answers INFO of a server with maxmemory 100 MB; a test changes what it uses and how often it refused a write."""

    def __init__(self, policy: str = "noeviction") -> None:
        self.used, self.refused, self.policy, self.asked = 0, 0, policy, 0

    def info(self, section: Any = None, *others: Any, **options: Any) -> dict[str, Any]:
        self.asked += 1
        if section == "errorstats":
            return {"errorstat_OOM": {"count": self.refused}} if self.refused else {}
        return {"used_memory": self.used, "maxmemory": 100_000_000, "maxmemory_policy": self.policy}


@pytest.mark.parametrize(("used", "payload"), [(90_000_000, 1), (70_000_000, 30_000_001)], ids=["share", "payload"])
def test_memory_that_is_nearly_full_is_warned_of(used: int, payload: int, logs: list[Any]) -> None:
    server = Filling()
    server.used = used
    MemoryWatch(server).look(0.0, payload)
    [warning] = logs
    assert "nearly full" in warning["event"]
    assert warning["used"] == f"{used / 1e6:.1f} MB of maxmemory 100.0 MB"
    assert warning["do"] == "raise its maxmemory, or lower dispatch.concurrency"


def test_memory_with_room_for_an_update_is_not_warned_of(logs: list[Any]) -> None:
    server = Filling()
    server.used = 89_000_000
    MemoryWatch(server).look(0.0, 11_000_000)
    assert logs == []


def test_writes_refused_to_workers_are_warned_of(logs: list[Any]) -> None:
    server = Filling()
    server.used, server.refused = 50_000_000, 7  # refused before this coordinator came
    watch = MemoryWatch(server)
    watch.look(0.0, 1)
    assert logs == []
    server.refused = 8
    watch.look(10.0, 1)
    assert [line["event"] for line in logs] == ["Redis refuses writes, because its memory is full"]


def test_full_memory_is_warned_of_again_after_ten_minutes(logs: list[Any]) -> None:
    server = Filling()
    watch, now = MemoryWatch(server), 0.0
    while now < 1200:
        server.refused += 1
        server.used = 95_000_000
        watch.look(now, 1)
        now += 10
    events = [line["event"].partition(",")[0].partition(":")[0] for line in logs]
    assert events == ["the memory of Redis is nearly full", *["Redis refuses writes"] * 2]


def test_server_is_asked_for_its_memory_rarely() -> None:
    server = Filling()
    watch = MemoryWatch(server)
    for now in range(100):
        watch.look(now / 10, 1)
    assert server.asked == 2, "one look has two sections"


def test_server_that_may_delete_any_key_may_be_full(logs: list[Any]) -> None:
    server = Filling("allkeys-lru")
    server.used = 100_000_000
    MemoryWatch(server).look(0.0, 1)
    assert logs == []


def test_user_without_the_right_to_ask_asks_once() -> None:
    server = Server(error=redis.exceptions.NoPermissionError("no INFO for this user"))
    watch = MemoryWatch(server)
    watch.look(0.0, 1)
    server.error = AssertionError("asked again")
    watch.look(100.0, 1)


def test_lost_run_names_the_eviction(tmp_path: Path) -> None:
    note = eviction_note(Server(limit=10, evicted=44))
    assert "evicted_keys: 44, maxmemory-policy allkeys-lru" in note
    assert note in str(RunLost("digits", tmp_path, note))
