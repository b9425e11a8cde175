"""What a server's refusal means, and a server that deletes keys when its memory is full."""

from __future__ import annotations

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
from fedqueue_coordinator.service.memory_policy import check_memory_policy

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
        check_memory_policy(Server(limit=5_000_000), CONFIG, MANIFEST)


@pytest.mark.parametrize("policy", ["allkeys-lfu", "volatile-lru", "volatile-ttl"])
def test_server_that_may_delete_keys_is_warned_of(policy: str) -> None:
    with structlog.testing.capture_logs() as logs:
        check_memory_policy(Server(policy, limit=50_000_000), CONFIG, MANIFEST)
    [warning] = logs
    assert warning["log_level"] == "warning"
    assert f"maxmemory-policy {policy}" in warning["because"]
    assert "set maxmemory-policy to noeviction" in warning["because"]


@pytest.mark.parametrize(
    "server",
    [
        Server("noeviction", limit=1),
        Server("allkeys-lru", limit=0),
        Server(error=redis.exceptions.NoPermissionError("no INFO for this user")),
    ],
    ids=["noeviction", "unlimited", "no-right"],
)
def test_other_servers_are_not_warned_of(server: Server) -> None:
    with structlog.testing.capture_logs() as logs:
        check_memory_policy(server, CONFIG, MANIFEST)
    assert not logs
    assert eviction(server)[0] == ""
    assert eviction_note(server) == ""


def test_lost_run_names_the_eviction(tmp_path: Path) -> None:
    note = eviction_note(Server(limit=10, evicted=44))
    assert "evicted_keys: 44, maxmemory-policy allkeys-lru" in note
    assert note in str(RunLost("digits", tmp_path, note))
