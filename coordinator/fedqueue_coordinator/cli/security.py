"""Commands for keys and access: acl, certs, enroll, revoke."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedqueue.errors import ConfigurationError
from fedqueue_coordinator.cli.options import Keys, Sets


def acl(
    run: Annotated[str, typer.Argument(metavar="RUN|CONFIG.toml", help="The run's name, or its configuration.")],
    client: Annotated[
        list[str] | None,
        typer.Option(metavar="ID", help="A client. May be repeated. Default: the clients of CONFIG.toml."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="DIR", help="Write to DIR; default: access/RUN.", show_default=False),
    ] = None,
    server: Annotated[
        str, typer.Option(metavar="URL", help="The address of Redis for all users, without user and password.")
    ] = "redis://localhost:6379",
    shared_worker: Annotated[
        bool, typer.Option("--shared-worker", help="Add a user `worker` that may serve any client, for replicas.")
    ] = False,
    dir_per_user: Annotated[
        bool, typer.Option("--dir-per-user", help="Write a folder with a password for each user, as container volumes.")
    ] = False,
    print_urls: Annotated[
        bool, typer.Option("--print-urls", help="Print the URLs too. They contain the passwords.")
    ] = False,
    set_: Sets = None,
) -> None:
    """Write Redis access rules: users.acl for the server, and a URL with its password for each user.

    The users are coordinator, worker-CLIENT for each client, viewer (dashboards) and admin; the default user is off.
    Repeated with another --client, the command adds a user and keeps the existing passwords.
    """
    from fedqueue_coordinator.operator.access.acl import (
        ACL_FILE,
        chosen_clients,
        write_access,
        write_access_folders,
    )

    name, clients = chosen_clients(run, client or [], set_ or [])
    folder = output or Path("access") / name
    if dir_per_user:
        names = write_access_folders(folder, name, clients, shared_worker)
        typer.echo(f"{folder}: {len(names)} users of run {name}, each with its own folder")
        return
    urls = write_access(folder, name, clients, server, shared_worker)
    typer.echo(f"{folder / ACL_FILE}: {len(urls)} users; their URLs are in {folder}/USER.url")
    if print_urls:
        for url in urls.values():
            typer.echo(url)


def certs(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Write to DIR. A CA that exists in DIR signs.")],
    host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="A name or address of the server. May be repeated. Default: localhost, 127.0.0.1, ::1."
        ),
    ] = None,
    client: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Make a client certificate NAME. May be repeated. Default: `client`."),
    ] = None,
    days: Annotated[int, typer.Option(metavar="N", help="Days until the certificates expire.")] = 365,
) -> None:
    """Make a test CA, a server certificate and client certificates for TLS to Redis.

    Each certificate is NAME.pem with its key in NAME.key. Keep ca.key off the machines that only use the certificates.
    """
    from fedqueue_coordinator.operator.access.certificates import write_certificates

    for path in write_certificates(folder, host or ["localhost", "127.0.0.1", "::1"], client or ["client"], days):
        typer.echo(str(path))


def enroll(
    clients: Annotated[list[str] | None, typer.Argument(metavar="CLIENT", help="Clients to enroll.")] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="CONFIG.toml", help="Enroll every client in CONFIG.toml that has no key yet.", show_default=False
        ),
    ] = None,
    keys: Keys = Path("keys"),
    site: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Write the site's part to DIR; default: KEYS/sites/CLIENT.", show_default=False
        ),
    ] = None,
    rotate: Annotated[
        bool, typer.Option("--rotate", help="Make a new key. The previous one stays valid until it is revoked.")
    ] = False,
    public: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Take the public key in FILE, which the site made itself.", show_default=False
        ),
    ] = None,
) -> None:
    """Make the keys with which coordinator and sites sign. Takes effect during a run, too.

    `enroll coordinator --rotate` gives the coordinator itself a new key.

    The folder --site is for the site: CLIENT.key is secret, and belongs to that site only. The worker reads the folder
    as security.keys.
    """
    from fedqueue_coordinator.operator.access.enrolment import enroll as enroll_one
    from fedqueue_coordinator.operator.access.enrolment import enroll_missing

    if config:
        from fedqueue.config.loading import load_config

        if clients or rotate or public:
            raise ConfigurationError(
                "--config", str(config), "not together with CLIENT, --rotate or --public", "leave one out"
            )
        made = enroll_missing(keys, load_config(config).clients.ids, site)
        typer.echo(f"enrolled {len(made)} clients: {', '.join(made) or 'all of them have keys'}")
        return
    if not clients or (public and len(clients) > 1):
        given = " ".join(clients) if clients else None
        problem = "more than one with --public" if clients else "missing"
        raise ConfigurationError("CLIENT", given, problem, "name one or more; exactly one with --public")
    for client in clients:
        path = enroll_one(keys, client, site, rotate, public)
        if path.is_file():
            typer.echo(f"{client}: distribute {path} to every site before restarting the coordinator")
        else:
            typer.echo(f"{client}: give {path} to the site, and keep no copy")


def revoke(
    client: Annotated[str, typer.Argument(metavar="CLIENT", help="An enrolled client.")],
    keys: Keys = Path("keys"),
    previous: Annotated[
        bool, typer.Option("--previous", help="Revoke only the previous key, after a rotation.")
    ] = False,
) -> None:
    """Revoke a client's key. Takes effect immediately, during a run too."""
    from fedqueue_coordinator.operator.access.enrolment import revoke as revoke_one

    revoke_one(keys, client, previous)
    typer.echo(f"{client}: {'previous key' if previous else 'all keys'} revoked")
