"""`fedqueue-worker`: what a site with data runs."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedqueue.errors import ConfigurationError
from fedqueue.terminal import configure_logging, exit_at_once
from fedqueue.terminal import main as run_app

if TYPE_CHECKING:
    from fedqueue.config.loading import Config

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",  # wraps paragraphs, and shows [task] as it is
)


@app.command()
def worker(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.toml", help="The configuration, with this site's [task].")],
    redis: Annotated[str, typer.Option(metavar="URL", help="Redis, instead of the configuration's redis.url.")] = "",
    run: Annotated[str, typer.Option(metavar="NAME", help="The run, instead of the configuration's name.")] = "",
    client: Annotated[
        list[str] | None,
        typer.Option(metavar="ID", help="Serve this client; repeat it to serve several, in turn."),
    ] = None,
    partition: Annotated[
        list[str] | None,
        typer.Option(metavar="I/N|auto", help="Serve partition I of N (from 0), or claim one that nobody serves."),
    ] = None,
    policy: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="What this site agrees to, instead of security.policy.", show_default=False),
    ] = None,
    processes: Annotated[
        int,
        typer.Option(metavar="N", min=1, help="Deal the clients out to N processes, which share one import of torch."),
    ] = 1,
    logs: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="With --processes: where each writes worker-I.log.", show_default=False),
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="Train one job, then leave.")] = False,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override section.key of CONFIG.toml."),
    ] = None,
) -> None:
    """Train on this machine's own data for a federated run: rows stay here, model updates leave.

    Waits for the run to start, joins it as one or more clients, and trains the jobs that the coordinator puts into
    their queues, until the run ends or SIGTERM comes (then the present job is handed back).
    """
    from fedqueue.config.loading import load_config

    configure_logging()
    for signum in (signal.SIGTERM, signal.SIGINT):  # until the worker has handlers of its own
        signal.signal(signum, exit_at_once)
    settings = load_config(config, [*(set_ or []), *([f"name={run}"] if run else [])])
    candidates = choose_candidates(settings, client or [], partition or [])
    url = settings.redis.address(redis)
    if not url:
        raise ConfigurationError("redis.url", "", "is required: set it, or pass --redis URL")
    folder = config.resolve().parent
    if processes > 1 or logs:
        from fedqueue_worker.prefork import fork, preload

        preload(settings.task.entrypoint, folder)
        number = fork(count := min(processes, len(candidates)), logs)
        candidates = candidates[number::count]

    from fedqueue.task import load_task
    from fedqueue.transport.connection import check, connect
    from fedqueue.transport.worker_store import WorkerStore
    from fedqueue_worker.egress_log import open_egress_log
    from fedqueue_worker.policy import ANYTHING, load_policy
    from fedqueue_worker.process import Worker, new_token

    connection = connect(url, tls=settings.redis.tls)
    security, token = settings.security, new_token()
    terms = policy or (Path(security.policy) if security.policy else None)
    agreed = load_policy(terms) if terms else ANYTHING
    identity = None
    if security.signatures == "required":
        from fedqueue.protocol.site_identity import load_site_identity

        identity = load_site_identity(Path(security.keys), settings.name, token)
        candidates = [only_with_keys(options, identity.clients, security.keys) for options in candidates]
    egress_log = open_egress_log(security.outbox, settings.name, token)
    check(connection, url)
    task = load_task(settings.task.entrypoint, settings.task.options, folder)
    store = WorkerStore(connection, settings.name, token, identity)
    because = Worker(settings, task, store, agreed, egress_log).run(candidates, once)
    typer.echo(f"fedqueue-worker: {because}", err=True)


def only_with_keys(candidates: list[str], clients: list[str], folder: str) -> list[str]:
    """Those in whose name this site can sign; raises ConfigurationError where there is none."""
    possible = [client for client in candidates if client in clients]
    if not possible:
        accepted = f"there is a key for {', '.join(clients)} only, not for {', '.join(candidates)}"
        raise ConfigurationError("security.keys", folder, accepted)
    return possible


def choose_candidates(config: Config, clients: list[str], partitions: list[str]) -> list[list[str]]:
    """For each client to serve, the identities it may take; without options, one free partition."""
    from pydantic import TypeAdapter, ValidationError

    from fedqueue.config.sections import ClientId

    ids = list(config.clients.ids)
    candidates = []
    for client in clients:
        try:
            candidates.append([TypeAdapter(ClientId).validate_python(client)])
        except ValidationError as error:
            message = error.errors()[0]["msg"].removeprefix("Value error, ")
            raise ConfigurationError("--client", client, message) from None
    for partition in partitions or ([] if clients else ["auto"]):
        if partition == "auto":
            candidates.append(ids)
            continue
        index, slash, count = partition.partition("/")
        if not (slash and index.isdecimal() and count.isdecimal() and int(index) < int(count) == len(ids)):
            raise ConfigurationError(
                "--partition", partition, f"'auto', or I/{len(ids)} with I from 0 to {len(ids) - 1}"
            )
        candidates.append([ids[int(index)]])
    return candidates


def main() -> None:
    run_app(app)
