"""`fedqueue dashboard`: binds the server to an address, and runs it until it is interrupted."""

from __future__ import annotations

import secrets
import socket
from collections.abc import Sequence
from pathlib import Path

import redis
import typer

from fedqueue.errors import ConfigurationError, MissingExtra
from fedqueue_coordinator.operator.dashboard.server import is_loopback, make_app
from fedqueue_coordinator.operator.dashboard.sources import RunSources
from fedqueue_coordinator.operator.runs import reachable_servers

try:
    import uvicorn
except ImportError:
    raise MissingExtra("fedqueue dashboard", "uvicorn", "dashboard") from None

ADDRESS = "--address"


def serve_dashboard(
    runs: Sequence[str], url: str, address: str, password_file: Path | None, certificate: Path | None, key: Path | None
) -> None:
    """Serve the page at `address`, HOST:PORT, until Ctrl-C; prints where it is.

    `runs` are names of runs in Redis, or folders of results; without any, all that are found are shown. Off loopback
    there is a login: with the password in `password_file`, or else one that is made and printed.
    Raises ConfigurationError for an address that cannot be used, and ServerUnavailable if `url` does not answer.
    """
    host, port = _parse(address)
    folders = [path for text in runs if (path := Path(text)).joinpath("ledger.jsonl").exists()]
    names = [text for text in runs if Path(text) not in folders]
    servers: list[redis.Redis] = reachable_servers(url) if url else []
    sources = RunSources((lambda: servers) if url else (lambda: reachable_servers("")), folders, names)
    if lost := [name for name in names if name not in sources.names()]:
        raise ConfigurationError(
            "RUN", lost[0], "no run of this name in Redis, and no folder of results",
            "name the server with --redis, or a folder such as runs/NAME (`fedqueue list` shows what there is)",
        )  # fmt: skip
    open_to_all = not is_loopback(host)
    password = _password(password_file) if password_file else secrets.token_urlsafe(12) if open_to_all else ""
    listening = listen(host, port)
    scheme = "https" if certificate else "http"
    shown = f"[{host}]" if ":" in host else host
    typer.echo(f"the page is at {scheme}://{shown}:{listening.getsockname()[1]}  (Ctrl-C ends it)")
    if password and not password_file:
        typer.echo(f"password: {password}")
    if open_to_all and not certificate:
        typer.echo("without --certificate and --key, password and runs cross the network in the clear", err=True)
    config = uvicorn.Config(
        make_app(sources, password, secure=certificate is not None), log_level="critical", access_log=False, ws="none",
        lifespan="off", server_header=False, timeout_graceful_shutdown=1,
        ssl_certfile=str(certificate) if certificate else None, ssl_keyfile=str(key) if key else None,
    )  # fmt: skip
    uvicorn.Server(config).run(sockets=[listening])


def _parse(address: str) -> tuple[str, int]:
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit() or int(port) > 65535:
        raise ConfigurationError(ADDRESS, address, "is no HOST:PORT", "write for example 127.0.0.1:8470")
    return host.strip("[]") or "127.0.0.1", int(port)


def _password(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise ConfigurationError("--password-file", str(path), f"cannot be read: {error.strerror}") from None
    if not text:
        raise ConfigurationError("--password-file", str(path), "is empty", "write the password into it")
    return text


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens, so that an address in use is an error before anything is printed."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listening = socket.create_server((host, port), family=family, backlog=128)
    except OSError as error:
        raise ConfigurationError(
            ADDRESS, f"{host}:{port}", f"cannot be used: {error.strerror or error}", "name another port, or 0 for any"
        ) from None
    return listening
