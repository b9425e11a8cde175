"""`fedqueue`: what the operator of a federation runs. Only the commands that train import torch."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Annotated

import typer

from fedqueue import __version__
from fedqueue.errors import ConfigurationError
from fedqueue.terminal import DONE, FAILED, configure_logging
from fedqueue.terminal import main as run_app

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",  # wraps paragraphs, and shows [task] as it is
    no_args_is_help=True,
    help="Asynchronous federated learning over Redis and RQ.",
)

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG.toml", help="The configuration of the run.")]
Url = Annotated[str, typer.Option("--redis", metavar="URL", help="redis://…, rediss://… or unix://…")]
Run = Annotated[str, typer.Option("--run", metavar="NAME", help="The run's name.")]
Sets = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override section.key of CONFIG.toml.")
]
Output = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Where the results go; by default runs/NAME.", show_default=False),
]

Keys = Annotated[Path, typer.Option(metavar="DIR", help="The coordinator's key folder (security.keys).")]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fedqueue {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def run(
    config: Annotated[
        Path | None, typer.Argument(metavar="CONFIG.toml", help="The configuration of the run.", show_default=False)
    ] = None,
    workers: Annotated[int, typer.Option(metavar="N", min=1, help="Worker processes.")] = 4,
    set_: Sets = None,
    output: Output = None,
    seed: Annotated[int | None, typer.Option(metavar="S", help="Seed, instead of the configuration's.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show nothing but errors.")] = False,
    resume: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Go on with the run in DIR that was interrupted or died.", show_default=False),
    ] = None,
) -> None:
    """Run a whole federation on this machine: server, coordinator, workers.

    Starts an embedded Redis-protocol server unless redis.url is set. Ctrl-C ends the run and keeps the model so far;
    --resume DIR goes on with it, or with one whose machine died.
    """
    from fedqueue.config.loading import load_config
    from fedqueue_coordinator.operator.launch_record import Launch, read_launch

    overrides = [*(set_ or []), *([f"seed={seed}"] if seed is not None else [])]
    if resume and config:
        raise ConfigurationError("CONFIG", str(config), f"not with --resume, which takes it from {resume}")
    if resume:
        launch = read_launch(resume, overrides)
        folder = resume
    elif config:
        launch = Launch(config.resolve(), overrides, workers)
        folder = output or Path("runs") / load_config(config, overrides).name
    else:
        raise ConfigurationError("CONFIG", None, "is required, or --resume DIR")
    settings = load_config(launch.config, launch.overrides)
    from fedqueue_coordinator.operator.local_run import run_local

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "coordinator.log").open("a" if resume else "w") as log:
        configure_logging(log)
        raise typer.Exit(run_local(settings, launch, folder, quiet, resume is not None))


@app.command()
def compare(
    config: ConfigPath,
    modes: Annotated[
        str, typer.Option(metavar="A,B,…", help="Modes; by default fedavg,fedasync,fedbuff, or only the variants.")
    ] = "",
    variant: Annotated[
        list[str] | None,
        typer.Option(metavar='"NAME: KEY=VALUE …"', help="A contender with settings of its own; may be repeated."),
    ] = None,
    seeds: Annotated[int, typer.Option(metavar="N", min=1, help="Seeds 0 to N−1, the same for each mode.")] = 3,
    seed_key: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY", help="A further key that gets the seed, such as task.options.seed."),
    ] = None,
    tune: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=A,B,…", help="Choose a value for each mode, on two seeds of its own."),
    ] = None,
    updates: Annotated[
        int, typer.Option(metavar="N", min=0, help="Updates per run; 0: stop.updates, else 50 for each client.")
    ] = 0,
    speeds: Annotated[
        str, typer.Option(metavar="A:B:…", help="How many times slower the clients are, dealt out in turn.")
    ] = "",
    batch_seconds: Annotated[float, typer.Option(metavar="S", min=1e-9, help="Virtual time of one batch.")] = 0.01,
    job_seconds: Annotated[float, typer.Option(metavar="S", min=0, help="Virtual time until a job begins.")] = 0.01,
    jitter: Annotated[float, typer.Option(metavar="X", min=0, help="Noise of each job's duration; 0.1: 10 %.")] = 0.1,
    set_: Sets = None,
    output: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where the results go; by default runs/NAME-compare.", show_default=False),
    ] = None,
) -> None:
    """Compare aggregation modes on the same clients and speeds, under a virtual clock.

    Each run trains for real, in this process, with the coordinator's own state machine; only time is computed: a job
    takes its batches times --batch-seconds times clients.slowdown. Every run goes on past stop.target until it has
    merged --updates. Writes comparison.md, comparison.json and comparison.png, and prints the table.
    """
    from fedqueue_coordinator.operator.compare import compare_modes

    compare_modes(
        config, modes, variant or [], seeds, seed_key or [], tune or [], updates, speeds,
        (batch_seconds, job_seconds, jitter), set_ or [], output,
    )  # fmt: skip


@app.command()
def coordinator(
    config: ConfigPath,
    redis: Url = "",
    run: Run = "",
    set_: Sets = None,
    output: Output = None,
    standby: Annotated[
        bool, typer.Option("--standby", help="Wait while another coordinator leads, and take over when it is gone.")
    ] = False,
) -> None:
    """Lead a run on a Redis server that workers reach too.

    Goes on with a run that its last coordinator left unfinished; when Redis comes back empty, with the checkpoint in
    DIR. SIGTERM leaves the run as it is, for the next coordinator; SIGINT (Ctrl-C) ends it.
    """
    from fedqueue.config.loading import load_config

    configure_logging()
    settings = load_config(config, [*(set_ or []), *([f"name={run}"] if run else [])])
    url = settings.redis.address(redis)
    if not url:
        raise ConfigurationError("redis.url", "", "is required: set it, or pass --redis URL")
    from fedqueue.protocol.coordinator_identity import load_coordinator_identity
    from fedqueue.task import load_task
    from fedqueue.transport.connection import check, connect
    from fedqueue_coordinator.operator.local_run import INTERRUPT, exit_code, print_result
    from fedqueue_coordinator.operator.progress_view import LiveView
    from fedqueue_coordinator.operator.results import write_results
    from fedqueue_coordinator.service.coordinator import Coordinator
    from fedqueue_coordinator.service.coordinator_store import CoordinatorStore, new_owner

    security = settings.security
    identity = (
        load_coordinator_identity(Path(security.keys), settings.name) if security.signatures == "required" else None
    )
    task = load_task(settings.task.entrypoint, settings.task.options, config.resolve().parent)
    connection = connect(url, tls=settings.redis.tls)
    check(connection, url)
    view = LiveView(settings, quiet=False)
    folder = output or Path("runs") / settings.name
    store = CoordinatorStore(connection, settings.name, new_owner(), identity)
    leading = Coordinator(settings, task, store, folder, view.update)
    signal.signal(signal.SIGTERM, lambda *_: leading.pause())
    signal.signal(signal.SIGINT, lambda *_: leading.interrupt(INTERRUPT))
    with view:
        result = leading.run(standby)
    if result is None:
        typer.echo("fedqueue: left the run for another coordinator to go on with", err=True)
        return
    print_result(view, write_results(folder, settings, result), folder)
    raise typer.Exit(exit_code(result))


@app.command()
def status(
    redis: Url = "",
    run: Run = "",
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show where a run stands: the only one there is, or the one named with --run."""
    from fedqueue_coordinator.operator.status import show_status

    show_status(redis, run, json)


@app.command()
def runs(redis: Url = "", json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List the runs on the Redis server, and the results under runs/."""
    from fedqueue_coordinator.operator.status import show_runs

    show_runs(redis, json)


@app.command()
def export(
    run: Annotated[str, typer.Argument(metavar="RUN", help="The run's name.")],
    output: Annotated[Path, typer.Option(metavar="FILE", help="Where the model goes.")],
    version: Annotated[
        int | None, typer.Option(metavar="V", help="A version that is still stored; by default the newest.")
    ] = None,
    redis: Url = "",
    keys: Keys = Path("keys"),
) -> None:
    """Write a version of the model as safetensors: a plain state_dict.

    Out of Redis, it is verified where KEYS has the coordinator's public key.
    """
    from fedqueue_coordinator.operator.export import export_model

    exported, doubt = export_model(redis, run, version, output, keys)
    typer.echo(f"version {exported} of {run} is in {output}{f' (not verified: {doubt})' if doubt else ''}")


@app.command()
def audit(
    run: Annotated[str, typer.Argument(metavar="RUN|DIR", help="The run's name, or the folder of its results.")],
    redis: Url = "",
    keys: Keys = Path("keys"),
) -> None:
    """Check that every job ended once, no update was merged twice, no version is missing; exit 1 on a violation.

    Where KEYS has the coordinator's public key, what it signed is verified too.
    """
    from fedqueue_coordinator.operator.audit.audit import audit as check
    from fedqueue_coordinator.operator.audit.audit import ok, read_audit_input
    from fedqueue_coordinator.operator.status import show_audit

    checks = check(read_audit_input(run, redis, keys))
    show_audit(run, checks)
    raise typer.Exit(DONE if ok(checks) else FAILED)


@app.command()
def acl(
    run: Annotated[str, typer.Argument(metavar="RUN|CONFIG.toml", help="The run's name, or its configuration.")],
    client: Annotated[
        list[str] | None, typer.Option(metavar="ID", help="A client; repeat it. By default those of CONFIG.toml.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where they go; by default access/RUN.", show_default=False)
    ] = None,
    server: Annotated[
        str, typer.Option(metavar="URL", help="Where all of them reach Redis, without user and password.")
    ] = "redis://localhost:6379",
    pool: Annotated[
        bool, typer.Option("--pool", help="A user `worker` too, for replicas that serve any client.")
    ] = False,
    split: Annotated[
        bool, typer.Option("--split", help="A folder with a password for each user, as volumes of containers.")
    ] = False,
    show: Annotated[bool, typer.Option("--show", help="Print the URLs too. They hold the passwords.")] = False,
    set_: Sets = None,
) -> None:
    """Write Redis access rules: users.acl for the server, and a URL with its password for each user.

    The users are coordinator, worker-CLIENT for each client, viewer (dashboards) and admin; the default user is off.
    Again with another --client, it adds a user; those that are there keep their passwords.
    """
    from fedqueue_coordinator.operator.access.acl_files import (
        ACL_FILE,
        chosen_clients,
        write_access,
        write_split_access,
    )

    name, clients = chosen_clients(run, client or [], set_ or [])
    folder = output or Path("access") / name
    if split:
        names = write_split_access(folder, name, clients, pool)
        typer.echo(f"{folder}: {len(names)} users of run {name}, each with a folder of its own")
        return
    urls = write_access(folder, name, clients, server, pool)
    typer.echo(f"{folder / ACL_FILE}: {len(urls)} users; their URLs are {folder}/USER.url")
    if show:
        for url in urls.values():
            typer.echo(url)


@app.command()
def certs(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where they go; a CA that is there signs.")],
    host: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="A name or address of the server; by default localhost, 127.0.0.1, ::1."),
    ] = None,
    client: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Whom to give a certificate; by default `client`.")
    ] = None,
    days: Annotated[int, typer.Option(metavar="N", help="How long they are valid.")] = 365,
) -> None:
    """Make a test CA, a server certificate and client certificates for TLS to Redis.

    Each is NAME.pem with its key in NAME.key; keep ca.key off the machines that only use the certificates.
    """
    from fedqueue_coordinator.operator.access.certificates import write_certificates

    for path in write_certificates(folder, host or ["localhost", "127.0.0.1", "::1"], client or ["client"], days):
        typer.echo(str(path))


@app.command()
def enroll(
    clients: Annotated[list[str] | None, typer.Argument(metavar="CLIENT", help="Clients to enroll.")] = None,
    all_of: Annotated[
        Path | None,
        typer.Option("--all", metavar="CONFIG.toml", help="Enroll its clients that are not yet.", show_default=False),
    ] = None,
    keys: Keys = Path("keys"),
    site: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Where the site's part goes; by default KEYS/sites/CLIENT.", show_default=False
        ),
    ] = None,
    rotate: Annotated[
        bool, typer.Option("--rotate", help="Make a new key; the one before it counts until it is revoked.")
    ] = False,
    public: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Take the public key that the site made itself.", show_default=False),
    ] = None,
) -> None:
    """Make the keys by which coordinator and sites know each other; a run need not be stopped for it.

    `enroll coordinator --rotate` gives the coordinator itself a new one.

    The folder --site is for the site: CLIENT.key is secret, and nobody else's. The worker finds it as security.keys.
    """
    from fedqueue_coordinator.operator.access.enrolment import enroll as enroll_one
    from fedqueue_coordinator.operator.access.enrolment import enroll_missing

    if all_of:
        from fedqueue.config.loading import load_config

        if clients or rotate or public:
            raise ConfigurationError("--all", str(all_of), "not together with CLIENT, --rotate or --public")
        made = enroll_missing(keys, load_config(all_of).clients.ids, site)
        typer.echo(f"enrolled {len(made)} clients: {', '.join(made) or 'all of them were'}")
        return
    if not clients or (public and len(clients) > 1):
        raise ConfigurationError("CLIENT", " ".join(clients or []), "one or more; exactly one with --public")
    for client in clients:
        place = enroll_one(keys, client, site, rotate, public)
        whom = "every site before the next coordinator leads" if place.is_file() else "the site, and keep no copy"
        typer.echo(f"{client}: give {place} to {whom}")


@app.command()
def revoke(
    client: Annotated[str, typer.Argument(metavar="CLIENT", help="An enrolled client.")],
    keys: Keys = Path("keys"),
    previous: Annotated[
        bool, typer.Option("--previous", help="Only the key before the present one, after a rotation.")
    ] = False,
) -> None:
    """Believe a client no longer, from now on; a run need not be stopped for it."""
    from fedqueue_coordinator.operator.access.enrolment import revoke as revoke_one

    revoke_one(keys, client, previous)
    typer.echo(f"{client}: {'its former key' if previous else 'everything it signs'} counts no more")


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new folder.")],
) -> None:
    """Write a commented starting point that runs as it is: task.py, federation.toml, README.md."""
    from fedqueue_coordinator.operator.scaffold import write_scaffold

    write_scaffold(folder)
    typer.echo(f"Try it:  fedqueue run {os.path.join(folder, 'federation.toml')}")


def main() -> None:
    run_app(app)
