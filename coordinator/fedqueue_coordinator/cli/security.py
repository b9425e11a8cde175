"""Commands for keys and access: acl, certs, enroll, keygen, revoke."""

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
    keeper: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="A keeper. May be repeated. Default: the keepers of CONFIG.toml."),
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

    The users are coordinator, worker-CLIENT for each client, keeper-NAME for each keeper, viewer (dashboards) and
    admin; the default user is off. Repeated with another --client, the command adds a user and keeps the existing
    passwords.
    """
    from fedqueue_coordinator.operator.access.acl import (
        ACL_FILE,
        chosen_parties,
        write_access,
        write_access_folders,
    )

    name, clients, keepers = chosen_parties(run, client or [], keeper or [], set_ or [])
    folder = output or Path("access") / name
    if dir_per_user:
        names = write_access_folders(folder, name, clients, shared_worker, keepers)
        typer.echo(f"{folder}: {len(names)} users of run {name}, each with its own folder")
        return
    urls = write_access(folder, name, clients, server, shared_worker, keepers)
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
    keeper: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="A keeper to enroll. May be repeated.", show_default=False),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="CONFIG.toml",
            help="Enroll every client and keeper in CONFIG.toml that has no key yet.",
            show_default=False,
        ),
    ] = None,
    keys: Keys = Path("keys"),
    site: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Write the site's part to DIR; default: KEYS/sites/CLIENT, for a keeper KEYS/keeper-sites/NAME.",
            show_default=False,
        ),
    ] = None,
    rotate: Annotated[
        bool, typer.Option("--rotate", help="Make a new key. The previous one stays valid until it is revoked.")
    ] = False,
    public: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Take the public key in FILE, which its owner made with `fedqueue keygen`.",
            show_default=False,
        ),
    ] = None,
    set_: Sets = None,
) -> None:
    """Make the keys with which coordinator, sites and keepers sign. Takes effect during a run, too.

    `enroll coordinator --rotate` gives the coordinator itself a new key.

    The folder --site is for the site: CLIENT.key is secret, and belongs to that site only. The worker reads the folder
    as security.keys. A keeper's folder has the public keys of the clients that it counts, and each site's folder those
    of the keepers that it trusts. A keeper makes its own key with `fedqueue keygen`, so that no operator ever has it.
    """
    from fedqueue.protocol.key_files import PUBLIC_SUFFIX, read_public_keys
    from fedqueue_coordinator.operator.access.enrolment import CLIENT, KEEPER, enroll_missing
    from fedqueue_coordinator.operator.access.enrolment import enroll as enroll_one

    if config:
        from fedqueue.config.loading import load_config

        if clients or keeper or rotate or public:
            raise ConfigurationError(
                "--config", str(config), "not together with CLIENT, --keeper, --rotate or --public", "leave one out"
            )
        settings = load_config(config, set_ or [])
        for names, role, folder in ((settings.secure.keepers, KEEPER, None), (settings.clients.ids, CLIENT, site)):
            if names:
                made = enroll_missing(keys, names, folder, role)
                typer.echo(f"enrolled {len(made)} {role.noun}s: {', '.join(made) or 'all of them have keys'}")
        return
    given = [*((name, CLIENT) for name in clients or []), *((name, KEEPER) for name in keeper or [])]
    if not given or (len(given) > 1 and (public or (site and keeper))):
        word = " ".join(name for name, _ in given) if given else None
        option = "--public" if public else "--site and --keeper"
        problem = f"more than one with {option}" if given else "missing"
        raise ConfigurationError("CLIENT", word, problem, f"name one or more; exactly one with {option}")
    for name, role in given:
        path = enroll_one(keys, name, site, rotate, public, role)
        if path.is_file():
            typer.echo(f"{name}: distribute {path} to every site and keeper before restarting the coordinator")
            continue
        key = read_public_keys(keys / role.enrolled / f"{name}{PUBLIC_SUFFIX}")[0].id
        owner = "site" if role is CLIENT else "keeper"
        typer.echo(f"{name}: give {path} to the {owner}, and keep no copy; key {key}")
        if role is KEEPER:
            typer.echo(f"{name}: give {keys / role.enrolled / name}{PUBLIC_SUFFIX} to every site")


def keygen(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The client or the keeper whose key it is.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Write to DIR.")] = Path("keys"),
) -> None:
    """Make a key pair on the machine that uses it, so that the private key never leaves it.

    Writes NAME.key, which is secret, and NAME.pub for the operator: `fedqueue enroll NAME --public NAME.pub`, or
    `fedqueue enroll --keeper NAME --public NAME.pub`.
    """
    from fedqueue.protocol.key_files import read_public_keys
    from fedqueue_coordinator.operator.access.enrolment import generate_key

    path = generate_key(output, name)
    typer.echo(f"{name}: send {path} to the operator; key {read_public_keys(path)[0].id}")


def revoke(
    client: Annotated[str, typer.Argument(metavar="CLIENT", help="An enrolled client.", show_default=False)] = "",
    keeper: Annotated[str, typer.Option(metavar="NAME", help="An enrolled keeper.", show_default=False)] = "",
    keys: Keys = Path("keys"),
    previous: Annotated[
        bool, typer.Option("--previous", help="Revoke only the previous key, after a rotation.")
    ] = False,
) -> None:
    """Revoke a client's or a keeper's key. Takes effect immediately, during a run too.

    Without its keeper, a run makes no further version; sites and keepers have copies of the keys of their own.
    """
    from fedqueue_coordinator.operator.access.enrolment import CLIENT, KEEPER
    from fedqueue_coordinator.operator.access.enrolment import revoke as revoke_one

    if bool(client) == bool(keeper):
        problem = "not together with --keeper" if client else "missing"
        raise ConfigurationError("CLIENT", client or None, problem, "name a client, or --keeper NAME")
    revoke_one(keys, client or keeper, previous, KEEPER if keeper else CLIENT)
    typer.echo(f"{client or keeper}: {'previous key' if previous else 'all keys'} revoked")
