"""Who may do what in Redis: the access rules of a run's users, as lines of an ACL file (Redis 7 or newer, Valkey).

Redis holds what a script does against the rights of whoever called it. So a right is never "this script": it is a pair
of commands and keys, and each pair is a selector of its own. `+xadd` counts for a client's own stream and for nothing
else, whether a script says it or the worker itself. On top of that, EVALSHA is allowed for the digests of the worker's
own scripts only, and nobody but coordinator and admin may load another.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from fedqueue.protocol.keys import RUNS, Keys, client_tag
from fedqueue.transport.store import script_digest
from fedqueue.transport.worker_store import SCRIPTS

COORDINATOR, VIEWER, ADMIN, POOL = "coordinator", "viewer", "admin", "worker"

NOBODY = "user default reset off ~* &* +@all"
"""Off and without a password: nobody can be this user. But Redis 7.0 reads its append-only file as this user, and drops
each transaction (so whatever a script wrote) that it has no right to: with none, a restart would lose the run."""

CONNECTION = (
    "hello", "auth", "ping", "select", "time", "info", "client|setname", "client|info", "client|id",
)  # fmt: skip
TRANSACTION = ("multi", "exec", "discard", "unwatch")
HASH = ("hget", "hmget", "hset", "hincrby", "hdel", "exists")
RQ_WORKER = (
    "blmove", "lmove", "lrem", "del", "exists", "expire", "persist", "watch",
    "hget", "hgetall", "hset", "hincrby", "hincrbyfloat", "sadd", "srem", "smembers",
    "zadd", "zrange", "zrem", "zremrangebyscore", "xadd",
)  # fmt: skip


@dataclass(frozen=True)
class Right:
    """One selector: these commands on these keys (`~` read and write, `%R~` read, `%W~` write) or channels (`&`)."""

    commands: tuple[str, ...]
    keys: tuple[str, ...] = ()

    def __str__(self) -> str:
        return " ".join(["-@all", *(f"+{c}" for c in self.commands), *self.keys])


def worker_rights(run: str, client: str | None) -> list[Right]:
    """What the worker that serves `client` may do; None: any client of the run, for workers of one trust."""
    keys = Keys(run)
    name = client or "?*"  # not the stream without a client, which is the coordinator's
    tag = client_tag(run, client) if client else "*"
    job, queue = f"{run}-*-{tag}", keys.queue(name)
    own_rq = [
        f"job:{job}", f"job:{job}:dependents", f"job::{job}:dependencies", f"results:{job}", f"executions:{job}",
        f"execution:{job}:*", f"worker:fedqueue-{job}", f"worker:fedqueue-{job}:executions", f"workers:{queue}",
        f"queue:{queue}", f"queue:{queue}:intermediate", f"wip:{queue}", f"failed:{queue}", f"finished:{queue}",
    ]  # fmt: skip
    read = [keys.config, keys.head, keys.leader, keys.clients, f"{keys.model_prefix}*"]
    return [
        Right((*CONNECTION, *TRANSACTION)),
        Right(("get", "getrange", "hget", "hgetall", "sismember"), _reading(read)),
        Right(tuple(f"evalsha|{script_digest(script)}" for script in SCRIPTS), (f"~{keys.pattern}",)),
        Right(("hget", "exists"), _reading([keys.job(job)])),
        Right(HASH, (f"~{keys.attempt(job)}",)),
        Right(HASH, (f"~{keys.site(name)}",)),
        Right(("xadd",), (f"%W~{keys.updates(name)}",)),
        Right(("publish",), (f"&{keys.wakeup}",)),
        Right(("set", "exists", "persist", "unlink"), (f"~{keys.payload_prefix}{job}:*",)),
        Right(RQ_WORKER, tuple(f"~rq:{key}" for key in own_rq)),
        Right(("sadd", "srem"), ("~rq:workers",)),
        Right(("exists",), ("%R~rq:suspended",)),
    ]


def coordinator_rights(run: str) -> list[Right]:
    """Everything with the keys of its run and of RQ's that belong to it; no administration of the server."""
    keys = Keys(run)
    of_run = [
        f"job:{run}-*", f"job::{run}-*", f"results:{run}-*", f"executions:{run}-*", f"execution:{run}-*",
        f"worker:fedqueue-{run}-*", "queues",
        *(f"{kind}:{keys.queue('*')}" for kind in ("queue", "wip", "failed", "finished", "workers")),
    ]  # fmt: skip
    commands = ("@read", "@write", "@transaction", "eval", "evalsha", "script|load", "script|exists")
    wakeup = ("publish", "subscribe", "unsubscribe")
    return [
        Right(
            (*commands, *wakeup, *CONNECTION),
            (f"&{keys.wakeup}", f"~{keys.pattern}", f"~{RUNS}", *(f"~rq:{key}" for key in of_run)),
        )
    ]


def viewer_rights(run: str) -> list[Right]:
    """Reading what a dashboard shows: neither the model, nor payloads, nor orders, nor what workers report."""
    keys = Keys(run)
    shown = [
        keys.config, keys.head, keys.leader, keys.versions, keys.clients, keys.site("*"), keys.jobs, keys.attempt("*"),
        keys.ledger, RUNS,
    ]  # fmt: skip
    reading = ("exists", "hget", "hmget", "hgetall", "hexists", "hstrlen", "smembers", "zrange", "xrange", "xlen")
    return [Right((*CONNECTION, *TRANSACTION)), Right(reading, _reading(shown))]


def users(run: str, clients: Iterable[str], pool: bool = False) -> dict[str, list[str]]:
    """User → its rules, for an ACL file. With `pool`, a user for replicas that serve any client is among them."""
    workers = {**({POOL: None} if pool else {}), **{f"worker-{client}": client for client in clients}}
    rights = {
        COORDINATOR: coordinator_rights(run),
        VIEWER: viewer_rights(run),
        **{user: worker_rights(run, client) for user, client in workers.items()},
    }
    rules = {user: _rules(of_user) for user, of_user in rights.items()}
    # In coordinator's categories are commands that tell or change more than its keys, KEYS among them.
    rules[COORDINATOR] += ["-@dangerous", "-@admin", "+info"]
    return {**rules, ADMIN: ["~*", "&*", "+@all"]}


def acl_file(passwords: Mapping[str, str], rules: Mapping[str, list[str]]) -> str:
    """The text of an ACL file; it holds SHA-256 digests of the passwords, and no user without one that is on."""
    lines = [NOBODY]
    for user, of_user in rules.items():
        digest = hashlib.sha256(passwords[user].encode()).hexdigest()
        lines.append(" ".join(["user", user, "reset", "on", f"#{digest}", *of_user]))
    return "\n".join(lines) + "\n"


def _rules(rights: list[Right]) -> list[str]:
    """The first right is the user's own, the others are selectors beside it."""
    first, *others = map(str, rights)
    return [first, *(f"({other})" for other in others)]


def _reading(keys: Iterable[str]) -> tuple[str, ...]:
    return tuple(f"%R~{key}" for key in keys)
