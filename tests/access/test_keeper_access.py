"""Rights of a keeper's Redis user on a real server: it reads what it is asked, and no update and no model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import redis
from typer.testing import CliRunner

from fedqueue.errors import ConfigurationError
from fedqueue.secure.keeper import Release
from fedqueue_coordinator.cli.main import app
from fedqueue_coordinator.operator.access.acl import chosen_parties
from fedqueue_keeper.keeper_store import FIRST, KeeperStore
from tests.support.acl_server import KEEPERS, AclServer, GuardedRun

pytestmark = pytest.mark.server

DENIED = r"(?i)no permissions|command not allowed|user executing the script can't"
COHORT = "0" * 64


@pytest.fixture
def asked(guarded: AclServer, led: GuardedRun) -> GuardedRun:
    """Return a run in which both keepers have been asked, and another keeper has answered."""
    coordinator = guarded.user("coordinator")
    for keeper in KEEPERS:
        coordinator.xadd(led.keys.asks(keeper), {"kind": "offer", "body": b"x"})
        coordinator.set(led.keys.keeper(keeper), b"key")
        coordinator.set(f"{led.keys.mask(COHORT, keeper)}:0", b"mask")
    coordinator.set(f"{led.keys.payload('job', 1)}:0", b"payload")
    coordinator.xadd(led.keys.updates("c0"), {"kind": "update"})
    guarded.denied()
    return led


@pytest.mark.parametrize("keeper", KEEPERS)
def test_keeper_may_run_the_commands_it_needs(guarded: AclServer, asked: GuardedRun, keeper: str) -> None:
    own = KeeperStore(guarded.user(f"keeper-{keeper}"), "sample")
    assert own.info().version == 0
    assert (glance := own.glance()) is not None
    assert glance.state == "running"
    own.publish_key(keeper, b"signed key")
    assert own.published_key(keeper) == b"signed key"
    [ask] = own.asks(keeper, FIRST, 0.001)
    assert (ask.kind, ask.body) == ("offer", b"x")
    own.say(keeper, [("opened", b"x")])
    release = Release(COHORT, 1, 3, 3, 40, (b"0" * 32,) * 3, (1, 1, 1), b"1" * 32, 1, 0.0)
    assert own.store_mask(keeper, release).chunks == 1
    assert guarded.user("coordinator").strlen(f"{own.keys.mask(COHORT, keeper)}:0") == 40
    assert guarded.denied() == []


FORBIDDEN: dict[str, Callable[[Any], tuple[Any, ...]]] = {
    "read a payload": lambda v: ("GET", v.keys.payload("job", 1) + ":0"),
    "read a part of a payload": lambda v: ("GETRANGE", v.keys.payload("job", 1) + ":0", 0, 1),
    "look for a payload": lambda v: ("EXISTS", v.keys.payload("job", 1) + ":0"),
    "delete a payload": lambda v: ("UNLINK", v.keys.payload("job", 1) + ":0"),
    "read the model": lambda v: ("GET", v.keys.model(0) + ":0"),
    "write the model": lambda v: ("SET", v.keys.model(0) + ":0", "poison"),
    "read an update's header": lambda v: ("XRANGE", v.keys.updates("c0"), "-", "+"),
    "report for a client": lambda v: ("XADD", v.keys.updates("c0"), "*", "kind", "left"),
    "read the ledger": lambda v: ("XRANGE", v.keys.ledger, "-", "+"),
    "write the ledger": lambda v: ("XADD", v.keys.ledger, "*", "record", "x"),
    "change the configuration": lambda v: ("HSET", v.keys.config, "state", "ended"),
    "move the head": lambda v: ("HSET", v.keys.head, "version", 9),
    "propose a cohort": lambda v: ("SET", v.keys.cohort, "x"),
    "ask itself": lambda v: ("XADD", v.keys.asks("audit"), "*", "kind", "offer"),
    "delete what it is asked": lambda v: ("XDEL", v.keys.asks("audit"), "1-1"),
    "read what another is asked": lambda v: ("XREAD", "STREAMS", v.keys.asks("audit-office"), "0"),
    "answer for another": lambda v: ("XADD", v.keys.says("audit-office"), "*", "kind", "opened"),
    "read its own answers": lambda v: ("XRANGE", v.keys.says("audit"), "-", "+"),
    "read its own mask": lambda v: ("GET", v.keys.mask(COHORT, "audit") + ":0"),
    "delete its own mask": lambda v: ("UNLINK", v.keys.mask(COHORT, "audit") + ":0"),
    "read another's mask": lambda v: ("GET", v.keys.mask(COHORT, "audit-office") + ":0"),
    "write another's mask": lambda v: ("SET", v.keys.mask(COHORT, "audit-office") + ":0", "poison"),
    "replace another's key": lambda v: ("SET", v.keys.keeper("audit-office"), "poison"),
    "read another's key": lambda v: ("GET", v.keys.keeper("audit-office")),
    "put a job into a queue": lambda v: ("RPUSH", "rq:queue:" + v.keys.queue("c0"), "job"),
    "run a script": lambda v: ("EVAL", "return 1", 0),
    "load a script": lambda v: ("SCRIPT", "LOAD", "return 1"),
    "delete everything": lambda v: ("FLUSHALL",),
    "list keys": lambda v: ("KEYS", "*"),
    "scan keys": lambda v: ("SCAN", 0),
    "watch commands": lambda v: ("MONITOR",),
    "listen on the bell": lambda v: ("PSUBSCRIBE", "*"),
}


@pytest.mark.parametrize("attempt", FORBIDDEN)
def test_keeper_is_denied(guarded: AclServer, asked: GuardedRun, attempt: str) -> None:
    keeper, admin = guarded.user("keeper-audit"), guarded.user("admin")
    before = {name: admin.dump(name) for name in admin.keys("*")}
    with pytest.raises(redis.ResponseError, match=DENIED):
        keeper.execute_command(*FORBIDDEN[attempt](asked))  # type: ignore[no-untyped-call]
    assert {name: admin.dump(name) for name in admin.keys("*")} == before


def test_worker_reads_the_keepers_keys_and_no_mask(guarded: AclServer, asked: GuardedRun) -> None:
    worker = guarded.user("worker-c0")
    assert worker.get(asked.keys.keeper("audit")) == b"key"
    for command in (
        ("SET", asked.keys.keeper("audit"), "poison"),
        ("XRANGE", asked.keys.asks("audit"), "-", "+"),
        ("XADD", asked.keys.says("audit"), "*", "kind", "opened"),
        ("GET", f"{asked.keys.mask(COHORT, 'audit')}:0"),
        ("GET", asked.keys.cohort),
    ):
        with pytest.raises(redis.ResponseError, match=DENIED):
            worker.execute_command(*command)  # type: ignore[no-untyped-call]


def test_keepers_come_from_configuration_or_command_line(tmp_path: Path) -> None:
    path = tmp_path / "f.toml"
    path.write_text('[task]\nentrypoint = "t.py:T"\n[secure]\nkeepers = ["a", "b"]\n[stop]\nversions = 1\n')
    assert chosen_parties(str(path), [], [], [])[2] == ["a", "b"]
    assert chosen_parties(str(path), [], ["c"], [])[2] == ["c"]
    with pytest.raises(ConfigurationError, match=r"^--keeper = 'a b': must be"):
        chosen_parties("r", ["north"], ["a b"], [])
    answer = CliRunner().invoke(app, ["acl", str(path), "--output", str(tmp_path / "access"), "--dir-per-user"])
    assert answer.exit_code == 0, answer.output
    assert (tmp_path / "access" / "keeper-a" / "redis.password").exists()
