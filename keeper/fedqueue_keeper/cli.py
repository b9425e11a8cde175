"""The command `fedqueue-keeper`, which an organisation runs that keeps masks and sees no update."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Annotated, Any

import typer

from fedqueue.errors import ConfigurationError
from fedqueue.exit_codes import exit_at_once, run_app, stop_signals
from fedqueue.logs import configure_logging, log_level, outlive_readers, say_at_end

PROGRAM = "fedqueue-keeper"
EPILOG = """
Examples:

- `fedqueue-keeper university federation.toml -u rediss://HOST` serves the run as the keeper `university`, until the run
ends.

- `fedqueue-keeper university federation.toml --keys keys/keeper-sites/university` reads its keys from that folder:
`university.key`, `coordinator.pub`, and `clients/CLIENT.pub`, its own roster.

- `fedqueue-keeper university federation.toml --policy keeper.toml` releases no sum over fewer clients than `min_cohort`
in that file.
"""


class KeeperApp(typer.Typer):
    """Has one name in help and in shell completion, however it was started."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **{"prog_name": PROGRAM, **kwargs})


app = KeeperApp(
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",  # wraps paragraphs, and shows [secure] unchanged
)


@app.command(epilog=EPILOG)
def keeper(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The keeper's name in secure.keepers.")],
    config: Annotated[
        Path,
        typer.Argument(metavar="CONFIG.toml", help="The configuration: the run's name, its [redis] and security.keys."),
    ],
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
        typer.Option(metavar="NAME", help="The run to serve; default: the configuration's name.", show_default=False),
    ] = "",
    keys: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="The folder with NAME.key, coordinator.pub and clients/*.pub; default: security.keys.",
            show_default=False,
        ),
    ] = None,
    policy: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="This keeper's limits; default: keeper.toml in the folder of its keys, where there is one.",
            show_default=False,
        ),
    ] = None,
    state: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="The folder of this keeper's file, with the run's key and what was released. Never restore it from a "
            "copy. Default: `state` in the folder of its keys.",
            show_default=False,
        ),
    ] = None,
    metrics: Annotated[
        str,
        typer.Option(
            metavar="ADDRESS",
            help="Serve metrics for Prometheus there: HOST:PORT, or a port of loopback; default: "
            "observability.metrics_address.",
            show_default=False,
        ),
    ] = "",
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log debug lines too.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Log warnings and errors only.")] = False,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", "-s", metavar="KEY=VALUE", help="Override a key of CONFIG.toml: redis.username=keeper."),
    ] = None,
) -> None:
    """Keep the masks of a federated run: the coordinator sees sums over many clients, and no update.

    Opens the seeds of masks that clients have encrypted to this keeper, and releases the sum of the masks of each
    version once. Waits for the run to start, and ends when the run ends. Reads neither updates nor models.
    """
    from fedqueue.config.loading import load_config

    outlive_readers()
    configure_logging(level=log_level(verbose, quiet))
    for signum in stop_signals():  # until the process installs its own handlers
        signal.signal(signum, exit_at_once)
    named = {"name": run, "observability.metrics_address": metrics}
    settings = load_config(config, [*(set_ or []), *(f"{key}={value}" for key, value in named.items() if value)])
    observability = settings.observability
    level = log_level(verbose, quiet, observability.log_level)
    configure_logging(None, level, observability.log_format, {"run": settings.name, "keeper": name})
    url = settings.redis.address(redis)
    if not url:
        raise ConfigurationError("redis.url", None, "missing", "set it, or pass --redis URL")

    from fedqueue.observability.endpoint import open_endpoint, own_registry
    from fedqueue.protocol.keeper_identity import load_keeper_identity
    from fedqueue.transport.connection import check, connect
    from fedqueue_keeper.policy import FILE, load_keeper_policy

    folder = keys or Path(settings.security.keys)
    identity = load_keeper_identity(folder, settings.name, name)
    endpoint = open_endpoint(observability.metrics_address)
    own = policy or (folder / FILE if (folder / FILE).exists() else None)
    check(connect(url, tls=settings.redis.tls), url)
    connection = connect(url, retries=0, tls=settings.redis.tls)  # each outage is seen: answers may be lost in it

    from fedqueue_keeper.keeper_metrics import UNOBSERVED, KeeperMetrics
    from fedqueue_keeper.keeper_store import KeeperStore
    from fedqueue_keeper.process import NO_POLICY, KeeperProcess

    limits = load_keeper_policy(own) if own else NO_POLICY
    registry = own_registry(endpoint)
    observer = KeeperMetrics(registry) if registry else UNOBSERVED
    store = KeeperStore(connection, settings.name)
    serving = KeeperProcess(store, identity, state or folder / "state", limits, observer=observer)
    ended_because = serving.run()
    if not quiet:
        say_at_end(PROGRAM, ended_because, observability.log_format)


def main() -> None:
    """Run `fedqueue-keeper` with the arguments of this process."""
    run_app(app)
