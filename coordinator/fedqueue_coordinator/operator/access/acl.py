"""`fedqueue acl`: the Redis users of a run, their rights and their passwords (Redis 7 or newer, or Valkey).

Redis checks each command of a script against the rights of the script's caller. A right is therefore a pair of commands
and keys, written as one ACL selector: `+xadd` is allowed on a client's own stream and on no other key, whether a script
or the worker itself calls it. In addition, a worker may call EVALSHA only with the digests of its own scripts, and only
the coordinator and admin may load scripts.

Reading order: what each user may do (`worker_rights`, `keeper_rights`, `coordinator_rights`, `viewer_rights`), the text
of the ACL file (`users`, `acl_file`), then the two ways to write it (`write_access` for URLs, `write_access_folders`
for containers).
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

from pydantic import TypeAdapter, ValidationError

from fedqueue.config.loading import load_config
from fedqueue.config.names import ClientId, KeeperName, RunName
from fedqueue.errors import ConfigurationError
from fedqueue.protocol.key_files import write_private
from fedqueue.protocol.keys import RUNS, Keys, client_tag
from fedqueue.transport.connection import SCHEMES, without_password
from fedqueue.transport.lua_scripts import WORKER_SCRIPTS, script_digest

ACL_FILE = "users.acl"
SERVER_FOLDER, PASSWORD_FILE = "server", "redis.password"
PASSWORD_BYTES = 32
COORDINATOR, VIEWER, ADMIN = "coordinator", "viewer", "admin"
SHARED_WORKER = "worker"
"""The user of workers that may serve any client of the run; a worker of one client is the user worker-CLIENT."""

DEFAULT_USER = "user default reset off ~* &* +@all"
"""Off and without a password, so no client can log in as this user. The rights are for Redis 7.0, which replays its
append-only file as this user and drops each transaction, and so each script's writes, that the user has no right to.
Without these rights, a restart of Redis would lose the run."""

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
    """One ACL selector: `commands` on `keys` (`~` read and write, `%R~` read, `%W~` write) or channels (`&`)."""

    commands: tuple[str, ...]
    keys: tuple[str, ...] = ()

    def __str__(self) -> str:
        return " ".join(["-@all", *(f"+{c}" for c in self.commands), *self.keys])


def worker_rights(run: str, client: str | None) -> list[Right]:
    """Return the rights of the worker that serves `client`, or, for None, of a worker that may serve any client.

    Workers that share the second user trust each other: each can act for any client of the run.
    """
    keys = Keys(run)
    name = client or "?*"  # `?*` leaves out the stream without a client, which is the coordinator's
    tag = client_tag(run, client) if client else "*"
    job, queue = f"{run}-*-{tag}", keys.queue(name)
    own_rq = [
        f"job:{job}", f"job:{job}:dependents", f"job::{job}:dependencies", f"results:{job}", f"executions:{job}",
        f"execution:{job}:*", f"worker:fedqueue-{job}", f"worker:fedqueue-{job}:executions", f"workers:{queue}",
        f"queue:{queue}", f"queue:{queue}:intermediate", f"wip:{queue}", f"failed:{queue}", f"finished:{queue}",
    ]  # fmt: skip
    read = [
        keys.config, keys.head, keys.leader, keys.clients, f"{keys.model_prefix}*", f"{keys.keeper_prefix}*",
        keys.question,
    ]  # fmt: skip
    return [
        Right((*CONNECTION, *TRANSACTION)),
        Right(("get", "getrange", "hget", "hgetall", "sismember"), _reading(read)),
        Right(tuple(f"evalsha|{script_digest(script)}" for script in WORKER_SCRIPTS), (f"~{keys.pattern}",)),
        Right(("hget", "exists"), _reading([keys.job(job)])),
        Right(HASH, (f"~{keys.attempt(job)}",)),
        Right(HASH, (f"~{keys.site(name)}",)),
        Right(("hsetnx", "hset", "expire"), (f"~{keys.answer(name)}",)),
        Right(("xadd",), (f"%W~{keys.updates(name)}",)),
        Right(("publish",), (f"&{keys.wakeup}",)),
        Right(
            ("set", "setrange", "strlen", "expire", "exists", "persist", "unlink"),
            (f"~{keys.payload_prefix}{job}:*",),
        ),
        Right(RQ_WORKER, tuple(f"~rq:{key}" for key in own_rq)),
        Right(("sadd", "srem"), ("~rq:workers",)),
        Right(("exists",), ("%R~rq:suspended",)),
    ]


def keeper_rights(run: str, keeper: str) -> list[Right]:
    """Return the rights of a keeper: it reads what it is asked, and writes its answers and its masks.

    No key with a model, a payload or another keeper's masks is among them.
    """
    keys = Keys(run)
    return [
        Right((*CONNECTION, *TRANSACTION)),
        Right(("hget", "hmget", "hgetall"), _reading([keys.config, keys.head, keys.leader])),
        Right(("xread",), _reading([keys.asks(keeper)])),
        Right(("xadd",), (f"%W~{keys.says(keeper)}",)),
        Right(("get", "set"), (f"~{keys.keeper(keeper)}",)),
        Right(("publish",), (f"&{keys.wakeup}",)),
        Right(("set",), (f"%W~{keys.mask('*', keeper)}",)),
    ]


def coordinator_rights(run: str) -> list[Right]:
    """Return full rights to the run's keys and to RQ's keys of that run, without administration of the server."""
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
    """Return the right to read what a dashboard shows: no model, no payloads, no orders, no update streams."""
    keys = Keys(run)
    shown = [
        keys.config, keys.head, keys.leader, keys.versions, keys.clients, keys.site("*"), keys.jobs, keys.attempt("*"),
        keys.ledger, keys.counts, RUNS,
    ]  # fmt: skip
    reading = (
        "exists", "hget", "hmget", "hgetall", "hexists", "hstrlen", "smembers", "zrange", "xrange", "xrevrange", "xlen",
    )  # fmt: skip
    return [Right((*CONNECTION, *TRANSACTION)), Right(reading, _reading(shown))]


def users(
    run: str, clients: Iterable[str], shared_worker: bool = False, keepers: Iterable[str] = ()
) -> dict[str, list[str]]:
    """Return user → ACL rules. With `shared_worker`, the user SHARED_WORKER is one of them."""
    workers = {**({SHARED_WORKER: None} if shared_worker else {}), **{f"worker-{client}": client for client in clients}}
    rights = {
        COORDINATOR: coordinator_rights(run),
        VIEWER: viewer_rights(run),
        **{user: worker_rights(run, client) for user, client in workers.items()},
        **{f"keeper-{keeper}": keeper_rights(run, keeper) for keeper in keepers},
    }
    rules = {user: _rules(of_user) for user, of_user in rights.items()}
    # The coordinator's categories include commands that reach beyond its keys, such as KEYS.
    rules[COORDINATOR] += ["-@dangerous", "-@admin", "+info"]
    return {**rules, ADMIN: ["~*", "&*", "+@all"]}


def acl_file(passwords: Mapping[str, str], rules: Mapping[str, list[str]]) -> str:
    """Return the text of an ACL file, with a SHA-256 digest for each password; each enabled user has a password."""
    lines = [DEFAULT_USER]
    for user, of_user in rules.items():
        digest = hashlib.sha256(passwords[user].encode()).hexdigest()
        lines.append(" ".join(["user", user, "reset", "on", f"#{digest}", *of_user]))
    return "\n".join(lines) + "\n"


def _rules(rights: list[Right]) -> list[str]:
    """Write the first right as the user's root permissions and each further one as a selector."""
    first, *others = map(str, rights)
    return [first, *(f"({other})" for other in others)]


def _reading(keys: Iterable[str]) -> tuple[str, ...]:
    return tuple(f"%R~{key}" for key in keys)


def chosen_parties(
    run: str, clients: Sequence[str], keepers: Sequence[str], overrides: Sequence[str]
) -> tuple[str, list[str], list[str]]:
    """Return the run's name, clients and keepers: from the configuration if `run` is the path of one, else as given.

    `clients` and `keepers`, if not empty, take precedence over the configuration's. `overrides` are KEY=VALUE texts for
    the configuration. Raises ConfigurationError for an invalid name, and if there is no client.
    """
    if Path(run).is_file():
        config = load_config(Path(run), overrides)
        run, clients, keepers = config.name, clients or config.clients.ids, keepers or config.secure.keepers
    given = [("RUN", run, RunName)]
    given += [("--client", client, ClientId) for client in clients]
    given += [("--keeper", keeper, KeeperName) for keeper in keepers]
    for key, value, kind in given:
        try:
            TypeAdapter(kind).validate_python(value)
        except ValidationError as error:
            raise ConfigurationError(key, value, error.errors()[0]["msg"].removeprefix("Value error, ")) from None
    if not clients:
        raise ConfigurationError(
            "--client", None, "missing", f"pass --client ID, or the configuration file of {run} as RUN"
        )
    return run, list(clients), list(keepers)


def write_access(
    folder: Path,
    run: str,
    clients: Sequence[str],
    server: str,
    shared_worker: bool,
    keepers: Sequence[str] = (),
) -> dict[str, str]:
    """Write users.acl and one USER.url for each user, readable by the owner only; returns user → URL.

    A user whose URL is already in `folder` keeps its password, so a client can be added during a run. The URL file of
    a user that is no longer listed is deleted. `server` is the URL of Redis without user and password. Raises
    ConfigurationError for any other URL.
    """
    server_url = _split_server_url(server)
    rules = users(run, clients, shared_worker, keepers)
    passwords = {user: _password_in(folder / f"{user}.url") or _new_password() for user in rules}
    urls = {user: _with_credentials(server_url, user, password) for user, password in passwords.items()}
    for user in _users_in(folder / ACL_FILE) - urls.keys():
        (folder / f"{user}.url").unlink(missing_ok=True)
    for user, url in urls.items():
        write_private(folder / f"{user}.url", f"{url}\n".encode())
    write_private(folder / ACL_FILE, acl_file(passwords, rules).encode())
    return urls


def write_access_folders(
    folder: Path, run: str, clients: Sequence[str], shared_worker: bool, keepers: Sequence[str] = ()
) -> list[str]:
    """Write one folder for each user, so that each container mounts only its own as a volume; returns the users.

    USER/redis.password is for the key redis.password_file. The folder `server` is for the container of Redis: it has
    users.acl and the password of `admin`, both readable by any user, because that container runs as a user of its own.
    Existing passwords are kept, and passwords of users that are no longer listed are deleted, as in `write_access`.
    """
    rules = users(run, clients, shared_worker, keepers)
    folders = {user: folder / (SERVER_FOLDER if user == ADMIN else user) for user in rules}
    passwords = {user: _read(own / PASSWORD_FILE) or _new_password() for user, own in folders.items()}
    for user in _users_in(folder / SERVER_FOLDER / ACL_FILE) - folders.keys():
        (folder / user / PASSWORD_FILE).unlink(missing_ok=True)
    for user, own in folders.items():
        mode = 0o644 if user == ADMIN else 0o600
        write_private(own / PASSWORD_FILE, f"{passwords[user]}\n".encode(), mode, folder_mode=0o755)
    write_private(folder / SERVER_FOLDER / ACL_FILE, acl_file(passwords, rules).encode(), 0o644)
    return list(rules)


def _users_in(file: Path) -> set[str]:
    """Return the users of the ACL file that an earlier call wrote: only their files may be deleted."""
    return {line.split()[1] for line in _read(file).splitlines() if line.startswith("user ")}


def _new_password() -> str:
    return secrets.token_urlsafe(PASSWORD_BYTES)


def _split_server_url(server: str) -> SplitResult:
    parts = urlsplit(server)
    if parts.scheme not in SCHEMES or "@" in parts.netloc or not (parts.netloc or parts.path):
        hint = f"write {' or '.join(f'{scheme}://…' for scheme in SCHEMES)}"
        raise ConfigurationError("--server", without_password(server), "not a URL without user and password", hint)
    return parts


def _with_credentials(server: SplitResult, user: str, password: str) -> str:
    return server._replace(netloc=f"{user}:{password}@{server.netloc}").geturl()


def _password_in(path: Path) -> str:
    return urlsplit(_read(path)).password or ""


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8").strip() if path.exists() else ""
