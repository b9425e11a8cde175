"""Commands that take part in a run: a whole local federation, a coordinator, a worker."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from fedqueue.errors import ConfigurationError, FedqueueError
from fedqueue.exit_codes import stop_signals
from fedqueue.logs import configure_logging, log_level, outlive_readers
from fedqueue_coordinator.cli.options import ConfigPath, ConfiguredUrl, ResultsFolder, Sets, Verbose

RUN_EPILOG = """
Examples:

- `fedqueue run federation.toml --workers 8` trains with eight worker processes; results go to runs/NAME.

- `fedqueue run federation.toml -s aggregation.buffer_size=4 -s seed=1 -o runs/small` changes two settings.

- `fedqueue run --resume runs/small` continues a run that was interrupted.
"""


def run(
    config: Annotated[
        Path | None, typer.Argument(metavar="CONFIG.toml", help="The configuration of the run.", show_default=False)
    ] = None,
    workers: Annotated[
        int, typer.Option("--workers", "-n", metavar="N", min=1, help="Number of worker processes.")
    ] = 4,
    set_: Sets = None,
    output: ResultsFolder = None,
    seed: Annotated[
        int | None, typer.Option(metavar="S", help="The run's seed; default: the configuration's.", show_default=False)
    ] = None,
    verbose: Annotated[
        bool,
        typer.Option("--verbose", "-v", help="Log debug lines too, in DIR's logs, such as each posted update."),
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Show errors only; the logs in DIR stay complete.")
    ] = False,
    resume: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Continue the run in DIR that was interrupted or died.", show_default=False),
    ] = None,
) -> None:
    """Run a whole federation on this machine: server, coordinator, workers.

    Starts an embedded Redis-protocol server unless redis.url is set. Ctrl-C ends the run and keeps the latest model.
    --resume DIR continues it, or a run whose machine died.
    """
    from fedqueue.config.loading import load_config
    from fedqueue_coordinator.operator.local_run import Launch, read_launch

    outlive_readers()
    overrides = [*(set_ or []), *([f"seed={seed}"] if seed is not None else [])]
    if resume and config:
        raise ConfigurationError(
            "CONFIG", str(config), "not together with --resume", f"leave it out; it is in {resume}"
        )
    if resume:
        launch = read_launch(resume, overrides)
        folder = resume
    elif config:
        launch = Launch(config.resolve(), overrides, workers)
        folder = output or Path("runs") / load_config(config, overrides).name
    else:
        raise ConfigurationError("CONFIG", None, "missing", "name a configuration, or pass --resume DIR")
    settings = load_config(launch.config, launch.overrides)
    from fedqueue_coordinator.operator.local_run import run_local

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "coordinator.log"
    with open(path, "a" if resume else "w", encoding="utf-8", errors="backslashreplace") as log:
        configure_logging(log, log_level(verbose, quiet=False))
        raise typer.Exit(run_local(settings, launch, folder, quiet, resume is not None, verbose))


def coordinator(
    config: ConfigPath,
    redis: ConfiguredUrl = "",
    run: Annotated[
        str, typer.Option(metavar="NAME", help="The run's name; default: the configuration's.", show_default=False)
    ] = "",
    set_: Sets = None,
    output: ResultsFolder = None,
    standby: Annotated[
        bool, typer.Option("--standby", help="Wait while another coordinator leads, and take over when it fails.")
    ] = False,
    verbose: Verbose = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Log warnings and errors only; no progress.")] = False,
) -> None:
    """Lead a run on a Redis server that the workers can reach.

    Resumes a run that its last coordinator left unfinished. If Redis has lost the run, resumes from the checkpoint in
    DIR. SIGTERM and SIGHUP leave the run for the next coordinator; SIGINT (Ctrl-C) ends the run.
    """
    from fedqueue.config.loading import load_config

    outlive_readers()
    configure_logging(level=log_level(verbose, quiet))
    settings = load_config(config, [*(set_ or []), *([f"name={run}"] if run else [])])
    url = settings.redis.address(redis)
    if not url:
        raise ConfigurationError("redis.url", None, "missing", "set it, or pass --redis URL")
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
    view = LiveView(settings, quiet=quiet)
    folder = output or Path("runs") / settings.name
    store = CoordinatorStore(connection, settings.name, new_owner(), identity)
    leading = Coordinator(settings, task, store, folder, view.update)
    for signum in stop_signals():
        signal.signal(signum, lambda *_: leading.pause())
    signal.signal(signal.SIGINT, lambda *_: leading.interrupt(INTERRUPT))
    with view:
        result = leading.run(standby)
    if result is None:
        typer.echo("fedqueue: stopped; another coordinator can resume this run", err=True)
        return
    print_result(view, write_results(folder, settings, result), folder, result.failed)
    raise typer.Exit(exit_code(result))


WORKER_SETTINGS = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
"""The worker parses its own arguments, `--help` included."""


def worker(ctx: typer.Context) -> None:
    """Train on this machine's own data for a run: the same program as `fedqueue-worker`."""
    if importlib.util.find_spec("fedqueue_worker") is None:
        raise FedqueueError("the worker is not installed on this machine: install it with `pip install fedqueue`")
    command = [sys.executable, "-P", "-m", "fedqueue_worker", *ctx.args]
    os.execv(sys.executable, command)  # noqa: S606  # nosec B606 - the words of this command line, without a shell
