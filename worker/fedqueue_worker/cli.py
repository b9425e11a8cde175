"""The command `fedqueue-worker`, which a site with data runs. `fedqueue worker` starts the same program."""

from __future__ import annotations

import functools
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedqueue.errors import ConfigurationError
from fedqueue.exception_text import one_line
from fedqueue.exit_codes import DONE, FAILED, exit_at_once, run_app, stop_signals
from fedqueue.logs import configure_logging, log_level, outlive_readers, say_at_end

if TYPE_CHECKING:
    from fedqueue.config.schema import Config
    from fedqueue.observability.endpoint import Endpoint
    from fedqueue_worker.process import Worker

PROGRAM = "fedqueue-worker"
EPILOG = """
Examples:

- `fedqueue-worker federation.toml` serves one free partition of the run, until the run ends.

- `fedqueue-worker federation.toml -u rediss://HOST --client north --policy policy.toml` serves the client `north`,
within this site's policy.

- `fedqueue-worker federation.toml --client north --client south --processes 2 --logs logs` serves two clients, each in
a process.

- `fedqueue-worker federation.toml --max-jobs 1 --verbose` trains one job and shows every step of it.

- `fedqueue-worker federation.toml --client north --leak leak` measures what an update of `north` would tell, without
Redis; with `--policy`, it exits with 1 above `max_leak`.
"""


class WorkerApp(typer.Typer):
    """Has one name in help and in shell completion, however it was started."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **{"prog_name": PROGRAM, **kwargs})


app = WorkerApp(
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",  # wraps paragraphs, and shows [task] unchanged
)


def _once_is_renamed(given: bool) -> None:
    if given:
        raise typer.BadParameter("use --max-jobs 1 instead")


@app.command(epilog=EPILOG)
def worker(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.toml", help="The configuration, with this site's [task].")],
    redis: Annotated[
        str,
        typer.Option(
            "--redis",
            "--url",
            "-u",
            metavar="URL",
            help="The Redis server (redis://…, rediss://…, unix://…); default: redis.url.",
            show_default=False,
        ),
    ] = "",
    run: Annotated[
        str,
        typer.Option(metavar="NAME", help="The run to join; default: the configuration's name.", show_default=False),
    ] = "",
    client: Annotated[
        list[str] | None,
        typer.Option(metavar="ID", help="Serve this client. Repeat the option to serve several, in turn."),
    ] = None,
    partition: Annotated[
        list[str] | None,
        typer.Option(
            metavar="I/N|auto",
            help="Serve partition I of N (from 0), or any free one. Without --client and --partition: auto.",
        ),
    ] = None,
    device: Annotated[
        str,
        typer.Option(
            metavar="DEVICE",
            help="The torch device of this machine: auto, cpu, cuda:1, mps …; default: training.device.",
            show_default=False,
        ),
    ] = "",
    policy: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="This site's limits for jobs; default: security.policy.", show_default=False),
    ] = None,
    leak: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            show_default=False,
            help="Join no run: measure what the client's own update tells, and write leak.json and leak.png to DIR.",
        ),
    ] = None,
    processes: Annotated[
        int,
        typer.Option(metavar="N", min=1, help="Divide the clients among N processes, which share one import of torch."),
    ] = 1,
    logs: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Process I writes its log to DIR/worker-I.log; default: stderr.", show_default=False
        ),
    ] = None,
    metrics: Annotated[
        str,
        typer.Option(
            metavar="ADDRESS",
            help="Serve metrics for Prometheus there: HOST:PORT, or a port of loopback; default: "
            "observability.metrics_address. All --processes have the one address.",
            show_default=False,
        ),
    ] = "",
    max_jobs: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="End after N jobs; with --processes, N in each.", show_default=False),
    ] = None,
    burst: Annotated[
        bool, typer.Option("--burst", "-b", help="End as soon as no job is waiting in the clients' queues.")
    ] = False,
    new_client: Annotated[
        bool,
        typer.Option("--new-client", help="Accept a --client that is not among the run's clients (unsigned runs)."),
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Log debug lines too, such as each posted update.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Log warnings and errors only.")] = False,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", "-s", metavar="KEY=VALUE", help="Override a key of CONFIG.toml: training.threads=2."),
    ] = None,
    once: Annotated[bool, typer.Option("--once", hidden=True, callback=_once_is_renamed)] = False,
) -> None:
    """Train on this machine's own data for a federated run: rows stay here, model updates leave.

    Waits for the run to start, joins it as one or more clients, and trains the jobs that the coordinator puts into
    their queues. Ends when the run ends. On SIGTERM, SIGHUP or Ctrl-C, it hands its running job back and ends.
    """
    from fedqueue.config.loading import load_config

    outlive_readers()
    configure_logging(level=log_level(verbose, quiet))
    for signum in stop_signals():  # until the worker installs its own handlers
        signal.signal(signum, exit_at_once)
    own = {"name": run, "training.device": device, "observability.metrics_address": metrics}
    settings = load_config(config, [*(set_ or []), *(f"{key}={value}" for key, value in own.items() if value)])
    observability = settings.observability
    log_as_configured = functools.partial(
        configure_logging,
        level=log_level(verbose, quiet, observability.log_level),
        style=observability.log_format,
        fields={"run": settings.name},
    )
    log_as_configured()
    candidates = choose_candidates(settings, client or [], partition or [])
    security, folder = settings.security, config.resolve().parent
    policy_path = policy or (Path(security.policy) if security.policy else None)
    if leak:
        from fedqueue_worker.leak import measure_own_leak
        from fedqueue_worker.policy import ALLOW_ALL, load_policy

        limits = load_policy(policy_path) if policy_path else ALLOW_ALL
        raise typer.Exit(DONE if measure_own_leak(settings, folder, candidates, limits, leak) else FAILED)
    url = settings.redis.address(redis)
    if not url:
        raise ConfigurationError("redis.url", None, "missing", "set it, or pass --redis URL")
    from fedqueue.observability.endpoint import open_endpoint

    endpoint = open_endpoint(observability.metrics_address)
    if processes > 1 or logs:
        from fedqueue_worker.prefork import fork, number_of_this_child, preload

        count = min(processes, len(candidates))
        number = number_of_this_child()
        if number is None:
            fresh = not preload(settings.task.entrypoint, folder)
            number = fork(count, logs, log_as_configured, fresh, endpoint)
        endpoint = None
        candidates = candidates[number::count]

    serving, candidates = make_worker(settings, candidates, url, policy_path, folder, endpoint)
    ended_because = serving.run(candidates, max_jobs, burst, new_client)
    for idle, reason in serving.without_update.items():
        say_at_end(PROGRAM, f"no update from {idle}: {one_line(reason)}", observability.log_format)
    for line in serving.privacy_spent:
        say_at_end(PROGRAM, line, observability.log_format)
    if not quiet:
        say_at_end(PROGRAM, ended_because, observability.log_format)


def make_worker(
    settings: Config,
    candidates: list[list[str]],
    url: str,
    policy_path: Path | None,
    folder: Path,
    endpoint: Endpoint | None,
) -> tuple[Worker, list[list[str]]]:
    """Connect to Redis, load the task, and begin to serve metrics; returns the candidates that this site has keys for.

    Raises as `connect`, `check`, `load_task`, `load_policy` and `only_with_keys`.
    """
    from fedqueue.observability.endpoint import own_registry
    from fedqueue.task import load_task
    from fedqueue.transport.connection import check, connect
    from fedqueue.transport.worker_store import WorkerStore
    from fedqueue_worker.egress_log import open_egress_log
    from fedqueue_worker.policy import ALLOW_ALL, load_policy
    from fedqueue_worker.process import Worker, new_token
    from fedqueue_worker.worker_metrics import UNOBSERVED, WorkerMetrics

    security = settings.security
    connection = connect(url, tls=settings.redis.tls)
    token = new_token()
    site_policy = load_policy(policy_path) if policy_path else ALLOW_ALL
    identity = None
    if security.signatures == "required":
        from fedqueue.protocol.site_identity import load_site_identity

        identity = load_site_identity(Path(security.keys), settings.name, token)
        candidates = [only_with_keys(options, identity.clients, security.keys) for options in candidates]
    egress_log = open_egress_log(security.egress_log, settings.name, token)
    check(connection, url)
    task = load_task(settings.task.entrypoint, settings.task.options, folder)
    store = WorkerStore(connection, settings.name, token, identity)
    registry = own_registry(endpoint)
    observer = WorkerMetrics(registry) if registry else UNOBSERVED
    return Worker(settings, task, store, site_policy, egress_log, observer), candidates


def only_with_keys(candidates: list[str], clients: list[str], folder: str) -> list[str]:
    """The candidates that this site has a key for; raises ConfigurationError where it has none."""
    possible = [client for client in candidates if client in clients]
    if not possible:
        problem = f"has keys of {', '.join(clients) or 'no client'} only, not of {', '.join(candidates)}"
        raise ConfigurationError("security.keys", folder, problem, "name one of those, or add the key")
    return possible


def choose_candidates(config: Config, clients: list[str], partitions: list[str]) -> list[list[str]]:
    """For each client to serve, the ids it may have. Without clients and partitions, one free partition.

    Raises ConfigurationError for an invalid id or partition.
    """
    from pydantic import TypeAdapter, ValidationError

    from fedqueue.config.names import ClientId

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
                "--partition",
                partition,
                "no such partition",
                f"write 'auto', or I/{len(ids)} with I from 0 to {len(ids) - 1}",
            )
        candidates.append([ids[int(index)]])
    return candidates


def main() -> None:
    """Run `fedqueue-worker` with the arguments of this process."""
    run_app(app)
