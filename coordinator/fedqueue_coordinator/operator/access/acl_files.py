"""`fedqueue acl`: the access rules of a run as an ACL file for the server, and one secret for each user."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

from pydantic import TypeAdapter, ValidationError

from fedqueue.config.loading import load_config
from fedqueue.config.sections import ClientId, RunName
from fedqueue.errors import ConfigurationError
from fedqueue.protocol.key_files import write_private
from fedqueue.transport.connection import SCHEMES, without_password
from fedqueue_coordinator.operator.access.rules import ADMIN, acl_file, users

ACL_FILE = "users.acl"
SERVER_FOLDER, PASSWORD_FILE = "server", "redis.password"  # where each user has a folder of its own
PASSWORD_BYTES = 32


def chosen_clients(run: str, clients: Sequence[str], overrides: Sequence[str]) -> tuple[str, list[str]]:
    """Name and clients of a run: those of the configuration that `run` is the path of, or the ones given.

    Raises ConfigurationError for bad names, and where there is no client.
    """
    if Path(run).is_file():
        config = load_config(Path(run), overrides)
        run, clients = config.name, clients or config.clients.ids
    for key, value, kind in (("RUN", run, RunName), *(("--client", client, ClientId) for client in clients)):
        try:
            TypeAdapter(kind).validate_python(value)
        except ValidationError as error:
            raise ConfigurationError(key, value, error.errors()[0]["msg"].removeprefix("Value error, ")) from None
    if not clients:
        raise ConfigurationError("--client", None, f"is required, or the configuration of {run} instead of its name")
    return run, list(clients)


def write_access(folder: Path, run: str, clients: Sequence[str], server: str, pool: bool) -> dict[str, str]:
    """Write `users.acl` and `USER.url` for each user, all readable by the owner alone; returns user → URL.

    A user that has its URL in `folder` keeps the password, so a client can be added while a run goes on; the secret of
    one that is no longer there is deleted. `server` is the URL under which all of them reach Redis, without
    credentials. Raises ConfigurationError for any other.
    """
    place = _place(server)
    rules = users(run, clients, pool)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    passwords = {user: _known(folder / f"{user}.url") or _new_password() for user in rules}
    urls = {user: _with_credentials(place, user, password) for user, password in passwords.items()}
    for old in folder.glob("*.url"):
        if old.stem not in urls:
            old.unlink()
    for user, url in urls.items():
        write_private(folder / f"{user}.url", f"{url}\n".encode())
    write_private(folder / ACL_FILE, acl_file(passwords, rules).encode())
    return urls


def write_split_access(folder: Path, run: str, clients: Sequence[str], pool: bool) -> list[str]:
    """As `write_access`, with a folder for each user, so that each can be a volume of one container; returns the users.

    `USER/redis.password` is for `redis.password_file`. `server` is for the server's own container: `users.acl`, and the
    password of `admin`, both readable by whatever user that container runs as. Whoever has that container has Redis.
    """
    rules = users(run, clients, pool)
    places = {user: folder / (SERVER_FOLDER if user == ADMIN else user) for user in rules}
    passwords = {user: _read(place / PASSWORD_FILE) or _new_password() for user, place in places.items()}
    for old in folder.glob(f"*/{PASSWORD_FILE}"):
        if old.parent not in places.values():
            old.unlink()
    for user, place in places.items():
        place.mkdir(parents=True, exist_ok=True)
        write_private(place / PASSWORD_FILE, f"{passwords[user]}\n".encode(), 0o644 if user == ADMIN else 0o600)
    write_private(folder / SERVER_FOLDER / ACL_FILE, acl_file(passwords, rules).encode(), 0o644)
    return list(rules)


def _new_password() -> str:
    return secrets.token_urlsafe(PASSWORD_BYTES)


def _place(server: str) -> SplitResult:
    parts = urlsplit(server)
    if parts.scheme not in SCHEMES or "@" in parts.netloc or not (parts.netloc or parts.path):
        accepted = "a URL without user and password, " + ", ".join(f"{scheme}://…" for scheme in SCHEMES)
        raise ConfigurationError("--server", without_password(server), accepted)
    return parts


def _with_credentials(place: SplitResult, user: str, password: str) -> str:
    return place._replace(netloc=f"{user}:{password}@{place.netloc}").geturl()


def _known(path: Path) -> str:
    return urlsplit(_read(path)).password or ""


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8").strip() if path.exists() else ""
