"""Rights of the Redis users on a real server: required commands are allowed, and all others are denied."""

from __future__ import annotations

import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis

from fedqueue.errors import ServerUnavailable
from fedqueue.protocol.messages import Ending, Registration
from fedqueue.protocol.msgpack import pack_record
from fedqueue.transport.ledger_tail import LedgerTail
from fedqueue.transport.lua_scripts import WORKER_SCRIPTS, script_digest
from fedqueue.transport.retry import RedisRetry, transient_reason
from fedqueue.transport.store import Store
from fedqueue.transport.worker_store import WorkerStore
from fedqueue_coordinator.operator import removal
from fedqueue_coordinator.operator.embedded_server import find_server
from fedqueue_coordinator.operator.track import track_run
from tests.support.acl_server import CLIENTS, AclServer, GuardedRun, tagged
from tests.support.redis_commands import execute
from tests.support.sample_run import SampleRun

pytestmark = pytest.mark.server

DENIED = r"(?i)no permissions|command not allowed|user executing the script can't"  # Redis 7.0 sends the last message


def worker_store(server: AclServer, client: str, token: str = "worker-a", user: str = "") -> WorkerStore:
    return WorkerStore(server.user(user or f"worker-{client}"), "sample", token)


def post(worker: WorkerStore, run: SampleRun, claim: Any, value: float = 1.0) -> str:
    payload = run.payload(value)
    return worker.post(claim, run.update(payload), payload)


class Victim(GuardedRun):
    """A run whose client c1 has a posted update and a job in training; the attacker c0 serves its own client."""

    def __init__(self, server: AclServer) -> None:
        super().__init__(server)
        worker = worker_store(server, "c1", "worker-b")
        worker.join(["c1"], 60)
        worker.register(Registration(client="c1", examples=10))
        self.posted_job = self._dispatched(1, "c1")
        assert post(worker, self, worker.claim(self.posted_job, 60, "c1")) == ""
        self.job = self._dispatched(2, "c1")
        worker.claim(self.job, 60, "c1")
        self.own_job = self._dispatched(3, "c0")
        attacker = worker_store(server, "c0")
        attacker.join(["c0"], 60)
        self.own_claim = attacker.claim(self.own_job, 60, "c0")
        server.denied()

    def _dispatched(self, number: int, client: str) -> str:
        order = tagged(self, number, client)
        self.dispatch_order(order, number)
        return order.job


@pytest.fixture
def victim(guarded: AclServer) -> Victim:
    return Victim(guarded)


# Commands that a worker needs


@pytest.mark.parametrize("client", CLIENTS)
def test_worker_may_run_the_commands_it_needs(guarded: AclServer, led: SampleRun, client: str) -> None:
    run, worker = led, worker_store(guarded, client)
    assert worker.info().version == 0
    assert worker.join([client], 60) == client
    assert worker.register(Registration(client=client, examples=10))
    order = tagged(run, 1, client)
    run.dispatch_order(order, 1)
    claim = worker.claim(order.job, 60, client)
    base = np.ones(run.manifest.nbytes, np.uint8)
    worker.fetch(claim.version, base)
    assert not base.any()
    assert worker.heartbeat([client], 60, claim, True).owns_job
    worker.release_base(claim)
    assert post(worker, run, claim) == ""
    assert post(worker, run, claim) == "replayed"
    [entry] = run.updates()
    assert (entry.client, entry.job) == (client, order.job)
    assert run.publish(1, [entry]) == {1}
    second = tagged(run, 2, client)
    run.dispatch_order(second, 2)
    assert worker.end(worker.claim(second.job, 60, client), Ending(reason="returned")) == ""
    worker.leave([client])
    assert [e.kind for e in run.coordinator.unacknowledged()] == ["joined", "ended", "left"]
    assert guarded.denied() == []


def test_refused_posts_are_counted_and_leave_nothing(guarded: AclServer, victim: Victim) -> None:
    worker = worker_store(guarded, "c0")
    victim.coordinator.close(victim.own_job, {"kind": "abandoned"}, 1)
    assert post(worker, victim, victim.own_claim) == "closed"
    assert victim.coordinator.refused() == {"closed": 1}
    assert not [name for name in victim.names() if name.startswith(f"payload:{victim.own_job}")]


# Commands that are denied to a worker


FORBIDDEN: dict[str, Callable[[Victim], tuple[object, ...]]] = {
    "write the model": lambda v: ("SET", v.keys.model(0) + ":0", "poison"),
    "delete the model": lambda v: ("UNLINK", v.keys.model(0) + ":0"),
    "stage a model": lambda v: ("SET", v.keys.staged_model(1) + ":0", "poison"),
    "read the optimizer's state": lambda v: ("GET", v.keys.state(0) + ":0"),
    "move the head": lambda v: ("HSET", v.keys.head, "version", 9),
    "take the lead": lambda v: ("HSET", v.keys.leader, "token", 99),
    "change the configuration": lambda v: ("HSET", v.keys.config, "state", "ended"),
    "write the ledger": lambda v: ("XADD", v.keys.ledger, "*", "record", "x"),
    "read the ledger": lambda v: ("XRANGE", v.keys.ledger, "-", "+"),
    "add a client": lambda v: ("SADD", v.keys.clients, "ghost"),
    "remove a job": lambda v: ("SREM", v.keys.jobs, v.job),
    "rewrite its own order": lambda v: ("HSET", v.keys.job(v.own_job), "order", "x"),
    "end its own job": lambda v: ("UNLINK", v.keys.job(v.own_job)),
    "read another's payload": lambda v: ("GET", v.keys.payload(v.posted_job, 1) + ":0"),
    "look for another's payload": lambda v: ("EXISTS", v.keys.payload(v.posted_job, 1) + ":0"),
    "write another's payload": lambda v: ("SET", v.keys.payload(v.job, 1) + ":0", "poison"),
    "delete another's payload": lambda v: ("UNLINK", v.keys.payload(v.posted_job, 1) + ":0"),
    "read another's order": lambda v: ("HGET", v.keys.job(v.job), "order"),
    "steal another's attempt": lambda v: ("HINCRBY", v.keys.attempt(v.job), "number", 1),
    "end another's lease": lambda v: ("HSET", v.keys.attempt(v.job), "lease", 0),
    "take another's client": lambda v: ("HSET", v.keys.site("c1"), "holder", "worker-a"),
    "read another's site": lambda v: ("HGET", v.keys.site("c1"), "holder"),
    "report for another": lambda v: ("XADD", v.keys.updates("c1"), "*", "kind", "left"),
    "read what another reports": lambda v: ("XRANGE", v.keys.updates("c1"), "-", "+"),
    "report for the coordinator": lambda v: ("XADD", v.keys.updates(""), "*", "kind", "evaluated"),
    "read its own reports": lambda v: ("XRANGE", v.keys.updates("c0"), "-", "+"),
    "delete its own reports": lambda v: ("XDEL", v.keys.updates("c0"), "1-1"),
    "enqueue a job for another": lambda v: ("RPUSH", "rq:queue:" + v.keys.queue("c1"), "job"),
    "enqueue a job for itself": lambda v: ("RPUSH", "rq:queue:" + v.keys.queue("c0"), "job"),
    "move a job into another's queue": lambda v: (
        "LMOVE", "rq:queue:" + v.keys.queue("c0"), "rq:queue:" + v.keys.queue("c1"), "LEFT", "RIGHT",
    ),
    "take another's job": lambda v: (
        "BLMOVE", "rq:queue:" + v.keys.queue("c1"), f"rq:queue:{v.keys.queue('c0')}:intermediate", "LEFT", "RIGHT", 1,
    ),
    "drop another's job": lambda v: ("LREM", "rq:queue:" + v.keys.queue("c1"), 0, v.job),
    "rewrite another's job in RQ": lambda v: ("HSET", f"rq:job:{v.job}", "data", "poison"),
    "read another's job in RQ": lambda v: ("HGETALL", f"rq:job:{v.job}"),
    "suspend every worker": lambda v: ("SET", "rq:suspended", 1),
    "see another run": lambda v: ("HGETALL", v.keys.config.replace("{sample}", "{other}")),
    "list the runs": lambda v: ("SMEMBERS", "fedqueue:runs"),
    "flush all": lambda v: ("FLUSHALL",),
    "flush the database": lambda v: ("FLUSHDB",),
    "configure the server": lambda v: ("CONFIG", "SET", "dir", "elsewhere"),
    "read its configuration": lambda v: ("CONFIG", "GET", "*"),
    "list keys": lambda v: ("KEYS", "*"),
    "scan": lambda v: ("SCAN", 0),
    "evaluate": lambda v: ("EVAL", "return 1", 0),
    "evaluate reading": lambda v: ("EVAL_RO", "return 1", 0),
    "load a script": lambda v: ("SCRIPT", "LOAD", "return 1"),
    "flush the scripts": lambda v: ("SCRIPT", "FLUSH"),
    "load a function": lambda v: ("FUNCTION", "LOAD", "#!lua name=l\nredis.register_function('f', function() end)"),
    "call a function": lambda v: ("FCALL", "f", 0),
    "read the access rules": lambda v: ("ACL", "LIST"),
    "give itself rights": lambda v: ("ACL", "SETUSER", "worker-c0", "+@all"),
    "watch everything": lambda v: ("MONITOR",),
    "list clients": lambda v: ("CLIENT", "LIST"),
    "kill clients": lambda v: ("CLIENT", "KILL", "TYPE", "normal"),
    "publish": lambda v: ("PUBLISH", "rq:pubsub:all", "shutdown"),
    "shut it down": lambda v: ("SHUTDOWN", "NOSAVE"),
    "make it a replica": lambda v: ("REPLICAOF", "203.0.113.1", 6379),
    "load a module": lambda v: ("MODULE", "LOAD", "x.so"),
    "debug": lambda v: ("DEBUG", "SLEEP", 0),
    "dump a key": lambda v: ("DUMP", v.keys.model(0) + ":0"),
    "copy a key": lambda v: ("COPY", v.keys.model(0) + ":0", v.keys.payload(v.own_job, 1) + ":0"),
    "rename a key": lambda v: ("RENAME", v.keys.payload(v.own_job, 1) + ":0", v.keys.model(0) + ":0"),
}  # fmt: skip


@pytest.mark.parametrize("action", FORBIDDEN)
def test_denied_worker_command_changes_nothing(guarded: AclServer, victim: Victim, action: str) -> None:
    before = victim.contents()
    with pytest.raises(redis.ResponseError, match=DENIED):
        execute(guarded.user("worker-c0"), *FORBIDDEN[action](victim))
    assert victim.contents() == before


@pytest.mark.parametrize(
    "script",
    ["commit", "dispatch", "close", "ack", "end_run", "leader", "find_expired", "client_leases", "expire_clients"],
)
def test_worker_may_not_run_the_coordinators_scripts(guarded: AclServer, victim: Victim, script: str) -> None:
    with pytest.raises(redis.ResponseError, match=DENIED):
        guarded.user("worker-c0").evalsha(script_digest(script), 1, victim.keys.leader, "1")


BY_OWN_SCRIPTS: dict[str, Callable[[WorkerStore, Victim], object]] = {
    "join": lambda w, v: w.join(["c1"], 60),
    "join as nobody": lambda w, v: w.join(["ghost"], 60),
    "register": lambda w, v: w.register(Registration(client="c1", examples=10**6)),
    "leave": lambda w, v: w.leave(["c1"]),
    "claim": lambda w, v: w.claim(v.job, 60, "c0"),
    "heartbeat": lambda w, v: w.heartbeat(["c1"], 60, None, True),
    "release": lambda w, v: w.release_base(type(v.own_claim)(v.job, 1, 0)),
    "post": lambda w, v: w.end(type(v.own_claim)(v.job, 1, 0, 0, "c0"), Ending(reason="returned")),
    "post into another's stream": lambda w, v: w.end(
        type(v.own_claim)(v.own_job, 1, 0, 0, "c1"), Ending(reason="returned")
    ),
}


@pytest.mark.parametrize("token", ["worker-a", "worker-b"], ids=["own token", "the victim's token"])
@pytest.mark.parametrize("action", BY_OWN_SCRIPTS)
def test_worker_scripts_cannot_reach_other_clients_keys(
    guarded: AclServer, victim: Victim, action: str, token: str
) -> None:
    """Access is denied even with the token of the process that serves the other client."""
    own = victim.keys.attempt(victim.own_job)
    before = victim.contents() | {own: ...}
    with pytest.raises(redis.ResponseError, match=DENIED):
        BY_OWN_SCRIPTS[action](worker_store(guarded, "c0", token), victim)
    assert victim.contents() | {own: ...} == before, "the script changed another client's keys before the denial"


def test_each_denied_command_works_with_more_rights(guarded: AclServer, victim: Victim) -> None:
    """The server knows each of the denied commands, which shows that the tests above can fail."""
    admin = guarded.user("admin")
    for name, action in FORBIDDEN.items():
        command = str(action(victim)[0])
        assert execute(admin, "COMMAND", "INFO", command), name


def test_allowed_scripts_are_those_that_a_worker_runs(guarded: AclServer) -> None:
    """The worker's store calls exactly the scripts of the list."""
    import inspect

    source = inspect.getsource(WorkerStore)
    assert all(f'"{script}"' in source for script in WORKER_SCRIPTS)
    assert source.count("self.script(") == len(WORKER_SCRIPTS)


# Invalid data in a worker's own keys


GARBAGE = ["", "x", "nan", "inf", "-inf", "1e400", "0x10", "99999999999999999999", "-1"]


@pytest.mark.parametrize("value", GARBAGE)
def test_garbage_in_worker_records_is_harmless(guarded: AclServer, victim: Victim, value: str) -> None:
    attacker, run = guarded.user("worker-c0"), victim
    for field in ("number", "base", "pinned", "lease", "chunks", "posted"):
        attacker.hset(run.keys.attempt(run.own_job), field, value)
    for field in ("alive", "job", "registration", "refused:closed", "refused:closed "):
        attacker.hset(run.keys.site("c0"), field, value)
    attacker.xadd(run.keys.updates("c0"), {"kind": "update", "job": run.job, "attempt": value, "base": value})
    run.coordinator.find_expired()
    run.coordinator.alive_clients()
    assert set(run.coordinator.registrations()) == {"c1"}
    run.coordinator.refused()
    assert len(run.coordinator.jobs()) == 3
    forged = [e for e in run.updates() if e.client == "c0"]
    assert [(e.client, e.job) for e in forged] == [("c0", run.job)], "the entry does not name the user that wrote it"
    run.publish(1)
    run.coordinator.expire_clients(["c0"])
    run.coordinator.close(run.own_job, {"kind": "abandoned"}, 1)
    assert run.own_job not in [job.job for job in run.coordinator.jobs()]


def test_attempt_numbers_beyond_the_limit_are_ignored(guarded: AclServer, victim: Victim) -> None:
    guarded.user("worker-c0").hset(victim.keys.attempt(victim.own_job), mapping={"number": 10**15, "chunks": 10**15})
    assert victim.coordinator.close(victim.own_job, {"kind": "abandoned"}, 1)


# Missing scripts


def test_worker_waits_for_the_coordinator_to_load_scripts(guarded: AclServer, victim: Victim) -> None:
    guarded.user("admin").script_flush()
    worker = worker_store(guarded, "c0")
    with pytest.raises(redis.exceptions.NoScriptError) as caught:
        worker.heartbeat(["c0"], 60, None, True)
    assert "waiting for the coordinator" in transient_reason(caught.value)
    victim.coordinator.renew_lead(60)
    assert worker.heartbeat(["c0"], 60, None, True).run_state == "running"


# The other users


def test_viewer_reads_what_a_dashboard_shows(guarded: AclServer, victim: Victim) -> None:
    store = Store(guarded.user("viewer"), "sample")
    assert store.info().version == 0
    assert store.alive_clients() == ["c0", "c1"]
    assert store.registrations()["c1"]["examples"] == 10
    assert store.open_jobs() == 2
    assert store.ledger() == []
    assert store.refused() == {}
    assert store.stored_versions() == [0]
    assert LedgerTail(store).read() == []
    assert guarded.denied() == []


def test_viewer_may_track_a_run_to_its_end(
    guarded: AclServer, victim: Victim, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDQUEUE_REDIS__URL", guarded.urls["viewer"])
    record = {"kind": "version", "version": 1, "merged": [], "seconds": 1.0}
    victim.client.xadd(victim.keys.ledger, {"record": pack_record(record)})
    victim.coordinator.end("versions: 1 of 1", 3600, 1)
    guarded.denied()
    (tmp_path / "hooks.py").write_text("import fedqueue\n\nclass Silent(fedqueue.RunHooks):\n    pass\n")
    assert track_run("sample", "", [f"{tmp_path}/hooks.py:Silent"], False)
    assert guarded.denied() == []


VIEWER_MAY_NOT: dict[str, Callable[[Victim], tuple[object, ...]]] = {
    "read the model": lambda v: ("GET", v.keys.model(0) + ":0"),
    "read a payload": lambda v: ("GET", v.keys.payload(v.posted_job, 1) + ":0"),
    "read what is reported": lambda v: ("XRANGE", v.keys.updates("c1"), "-", "+"),
    "read an order": lambda v: ("HGET", v.keys.job(v.job), "order"),
    "read a queue": lambda v: ("LRANGE", "rq:queue:" + v.keys.queue("c1"), 0, -1),
    "write": lambda v: ("HSET", v.keys.head, "version", 9),
    "write the ledger": lambda v: ("XADD", v.keys.ledger, "*", "record", "x"),
    "run a script": lambda v: ("EVALSHA", script_digest("find_expired"), 1, v.keys.jobs, "a"),
    "flush": lambda v: ("FLUSHALL",),
    "list keys": lambda v: ("KEYS", "*"),
    "configure": lambda v: ("CONFIG", "GET", "*"),
}


@pytest.mark.parametrize("action", VIEWER_MAY_NOT)
def test_commands_of_a_viewer_beyond_reading_are_denied(guarded: AclServer, victim: Victim, action: str) -> None:
    with pytest.raises(redis.ResponseError, match=DENIED):
        execute(guarded.user("viewer"), *VIEWER_MAY_NOT[action](victim))


@pytest.mark.parametrize(
    "command",
    [
        ("FLUSHALL",), ("FLUSHDB",), ("CONFIG", "GET", "*"), ("KEYS", "*"), ("ACL", "LIST"), ("SHUTDOWN",),
        ("MONITOR",), ("SCRIPT", "FLUSH"), ("GET", "fedqueue:{other}:model:0:0"), ("SET", "elsewhere", 1),
        ("CLIENT", "KILL", "x"), ("HSET", "rq:job:other-00000001", "a", "b"),
        ("RPUSH", "rq:queue:fedqueue:other:c0", "x"),
    ],
    ids=lambda command: " ".join(map(str, command[:2])),
)  # fmt: skip
def test_coordinator_may_not_access_other_runs(guarded: AclServer, command: tuple[Any, ...]) -> None:
    with pytest.raises(redis.ResponseError, match=DENIED):
        execute(guarded.user("coordinator"), *command)


def test_login_without_a_password_is_refused(guarded: AclServer) -> None:
    stranger = guarded.user("admin")
    stranger.connection_pool.connection_kwargs.update(username=None, password=None)
    with pytest.raises(redis.RedisError, match=r"(?i)auth"):
        stranger.ping()


def test_shared_worker_serves_any_client_but_not_the_model(start_server: Callable[..., Any]) -> None:
    server = start_server(shared_worker=True)
    assert set(server.urls) == {"admin", "coordinator", "viewer", "worker", *(f"worker-{c}" for c in CLIENTS)}
    run = SampleRun(server.user("coordinator"))
    run.coordinator.create(run.config.model_dump_json(), run.manifest, clients=CLIENTS)
    worker = WorkerStore(server.user("worker"), "sample", "worker-a")
    assert worker.join(CLIENTS, 60) == "c0"
    order = tagged(run, 1, "c0")
    run.dispatch_order(order, 1)
    assert post(worker, run, worker.claim(order.job, 60, "c0")) == ""
    with pytest.raises(redis.ResponseError, match=DENIED):
        worker.redis.set(run.keys.model(0) + ":0", "poison")
    with pytest.raises(redis.ResponseError, match=DENIED):
        worker.redis.get(run.keys.payload(order.job, 1) + ":0")
    with pytest.raises(redis.ResponseError, match=DENIED):
        worker.redis.xadd(run.keys.updates(""), {"kind": "evaluated"})
    with pytest.raises(redis.ResponseError, match=DENIED):
        worker.redis.rpush("rq:queue:" + run.keys.queue("c1"), "job")
    for command in (["FLUSHALL"], ["CONFIG", "GET", "*"], ["KEYS", "*"], ["EVAL", "return 1", "0"], ["ACL", "LIST"]):
        with pytest.raises(redis.ResponseError, match=DENIED):
            execute(worker.redis, *command)


@pytest.mark.parametrize("program", ["embedded", "redis-server"])
def test_writes_of_scripts_survive_a_restart(program: str, tmp_path: Path) -> None:
    """Redis 7.0 replays its append-only file as the default user, which is disabled; see acl.DEFAULT_USER."""
    path = find_server() if program == "embedded" else shutil.which(program)
    if path is None:
        pytest.skip(f"no {program} here")
    server = AclServer(tmp_path, "sample", CLIENTS, program=path, appendonly="yes")
    try:
        coordinator = server.user("coordinator")
        coordinator.eval("redis.call('SET', KEYS[1], 1) redis.call('SET', KEYS[2], 2)", 2, *WRITTEN)
        server.restart()
        assert server.user("coordinator").mget(WRITTEN) == [b"1", b"2"]
        for stranger in ({"username": None, "password": None}, {"username": "default", "password": ""}):
            unknown = server.user("admin")
            unknown.connection_pool.connection_kwargs.update(stranger)
            with pytest.raises(redis.RedisError, match=r"(?i)auth|invalid username"):
                unknown.get(WRITTEN[0])
    finally:
        server.stop()


WRITTEN = ("fedqueue:{sample}:a", "fedqueue:{sample}:b")


# Files


def test_secrets_are_private_and_not_in_the_acl_file(guarded: AclServer) -> None:
    files = {path.name: path for path in (guarded.folder / "access").iterdir()}
    assert set(files) == {"users.acl", *(f"{user}.url" for user in guarded.urls)}
    assert {stat.S_IMODE(path.stat().st_mode) for path in files.values()} == {0o600}
    assert stat.S_IMODE((guarded.folder / "access").stat().st_mode) == 0o700
    rules = files["users.acl"].read_text()
    for url in guarded.urls.values():
        password = url.split(":")[2].partition("@")[0]
        assert len(password) >= 40
        assert password not in rules
    assert "nopass" not in rules


def test_error_for_another_client_names_the_allowed_client(guarded: AclServer, led: SampleRun) -> None:
    """A worker with `--partition auto` asks for other clients."""
    worker = worker_store(guarded, "c1")
    with pytest.raises(ServerUnavailable, match=r"Redis refuses: .*serves its own client only.*--client") as caught:
        RedisRetry().call(lambda: worker.join(CLIENTS, 60))
    assert "\n" not in str(caught.value)


def test_script_of_another_version_is_not_reported_as_an_outage(
    guarded: AclServer, led: SampleRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = worker_store(guarded, "c0")
    monkeypatch.setattr("fedqueue.transport.lua_scripts.script_digest", lambda name: "0" * 40)
    with pytest.raises(ServerUnavailable, match="version that wrote the rules"):
        RedisRetry().call(lambda: worker.heartbeat(["c0"], 60, None, True))


def test_coordinators_user_may_remove_a_run_and_viewer_may_not(
    guarded: AclServer, led: SampleRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    led.join("c0")
    led.dispatch(1)
    led.coordinator.release_lead()
    monkeypatch.setattr(removal, "reachable_servers", lambda url: [guarded.user(url)])
    with pytest.raises(redis.exceptions.NoPermissionError):
        removal.plan_removal("sample", "viewer", None).carry_out()
    guarded.denied()
    planned = removal.plan_removal("sample", "coordinator", None)
    assert "not ended" in next(planned.describe())
    planned.carry_out()
    assert guarded.denied() == []
    assert [key for key in guarded.user("admin").scan_iter() if b"sample" in key] == []
