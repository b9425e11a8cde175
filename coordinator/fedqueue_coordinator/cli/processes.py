"""Commands that take part in a run: a whole local federation, a coordinator, a worker."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from fedqueue.errors import ConfigurationError, FedqueueError
from fedqueue.logs import configure_logging, log_level, outlive_readers, say_at_end
from fedqueue_coordinator.cli.options import (
    ConfigPath,
    ConfiguredUrl,
    Metrics,
    Overwrite,
    ResultsFolder,
    Sets,
    Verbose,
    metrics_override,
)

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
        typer.Option(
            metavar="DIR", help="Continue the run in DIR that was interrupted, failed or died.", show_default=False
        ),
    ] = None,
    overwrite: Overwrite = False,
    metrics: Metrics = "",
) -> None:
    """Run a whole federation on this machine: server, coordinator, workers.

    Starts an embedded Redis-protocol server unless redis.url is set. Ctrl-C ends the run and keeps the latest model.
    --resume DIR continues it, or a run whose machine died; CONFIG.toml is needed then only if the file was moved.
    The results of an earlier run in DIR are replaced at the end of this run.
    """
    from fedqueue.config.loading import load_config
    from fedqueue_coordinator.operator.run_folder import LOG_FILENAME, Launch, RunFolder, read_launch, require_config

    outlive_readers()
    overrides = [*(set_ or []), *([f"seed={seed}"] if seed is not None else [])]
    own = metrics_override(metrics)
    if resume and (overwrite or (output and output != resume)):
        word = "--overwrite" if overwrite else "--output"
        raise ConfigurationError(word, None, "not together with --resume", f"leave it out; {resume} is resumed")
    if config and (config.is_fifo() or config.is_char_device()):
        problem = "is a pipe or a terminal, and each worker process reads the file again"
        raise ConfigurationError("CONFIG", str(config), problem, "save it as a file")
    if resume:
        launch = read_launch(resume, overrides, config)
        require_config(launch, resume)
        settings = load_config(launch.config, [*launch.overrides, *own])
        if launch.run and settings.name != launch.run:
            problem = f"is the configuration of run {settings.name!r}; {resume} has run {launch.run!r}"
            raise ConfigurationError("CONFIG", str(launch.config), problem, "pass the run's own configuration")
    elif config:
        settings = load_config(config, [*overrides, *own])
        launch = Launch(config.resolve(), overrides, workers, run=settings.name)
    else:
        raise ConfigurationError("CONFIG", None, "missing", "name a configuration, or pass --resume DIR")
    folder = RunFolder(resume or output or Path("runs") / settings.name)
    from fedqueue_coordinator.operator.local_run import run_local

    opened, path = folder.opened(launch, overwrite, resume is not None), folder.path / LOG_FILENAME
    with opened, path.open("a", encoding="utf-8", errors="backslashreplace") as log:
        level = log_level(verbose, quiet=False, configured=settings.observability.log_level)
        configure_logging(log, level, settings.observability.log_format, {"run": settings.name})
        raise typer.Exit(run_local(settings, launch, folder, quiet, resume is not None, verbose, overwrite))


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
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue a run that failed or that Ctrl-C ended, from the checkpoint.")
    ] = False,
    overwrite: Overwrite = False,
    metrics: Metrics = "",
    verbose: Verbose = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Log warnings and errors only; no progress.")] = False,
) -> None:
    """Lead a run on a Redis server that the workers can reach.

    Resumes a run that its last coordinator left unfinished. If Redis has lost the run, resumes from the checkpoint in
    DIR. SIGTERM and SIGHUP leave the run for the next coordinator; SIGINT (Ctrl-C) ends the run. The results of an
    earlier run in DIR are replaced at the end of this run.
    """
    from fedqueue.config.loading import load_config

    if resume and overwrite:
        raise ConfigurationError("--overwrite", None, "not together with --resume", "leave one out")
    outlive_readers()
    configure_logging(level=log_level(verbose, quiet))
    overrides = [*(set_ or []), *([f"name={run}"] if run else [])]
    settings = load_config(config, [*overrides, *metrics_override(metrics)])
    observability = settings.observability
    level = log_level(verbose, quiet, observability.log_level)
    configure_logging(None, level, observability.log_format, {"run": settings.name})
    url = settings.redis.address(redis)
    if not url:
        raise ConfigurationError("redis.url", None, "missing", "set it, or pass --redis URL")
    from fedqueue.observability.endpoint import open_endpoint
    from fedqueue.protocol.coordinator_identity import load_coordinator_identity
    from fedqueue.task import load_task, prepare_task
    from fedqueue.transport.connection import check, connect
    from fedqueue_coordinator.operator.lead_run import lead_run
    from fedqueue_coordinator.operator.local_run import exit_code
    from fedqueue_coordinator.operator.run_folder import Launch, RunFolder

    security = settings.security
    identity = (
        load_coordinator_identity(Path(security.keys), settings.name) if security.signatures == "required" else None
    )
    if identity:
        identity.require_keepers(settings.secure.keepers)
    task = load_task(settings.task.entrypoint, settings.task.options, config.resolve().parent)
    settings = prepare_task(task, settings)
    endpoint = open_endpoint(observability.metrics_address)
    connection = connect(url, tls=settings.redis.tls)
    check(connection, url)
    launch = Launch(config.resolve(), overrides, command="coordinator", run=settings.name)
    folder = RunFolder(output or Path("runs") / settings.name)
    with folder.opened(launch, overwrite, shared=True):
        result = lead_run(settings, task, connection, identity, folder, quiet, standby, resume, overwrite, endpoint)
    if result is None:
        say_at_end("fedqueue", "stopped; another coordinator can resume this run", observability.log_format)
        return
    raise typer.Exit(exit_code(result))


WORKER_SETTINGS = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
"""The worker parses its own arguments, `--help` included."""


def worker(ctx: typer.Context) -> None:
    """Train on this machine's own data for a run: the same program as `fedqueue-worker`."""
    if importlib.util.find_spec("fedqueue_worker") is None:
        raise FedqueueError("the worker is not installed on this machine: install it with `pip install fedqueue`")
    command = [sys.executable, "-P", "-m", "fedqueue_worker", *ctx.args]
    os.execv(sys.executable, command)  # noqa: S606  # nosec B606 - the words of this command line, without a shell
