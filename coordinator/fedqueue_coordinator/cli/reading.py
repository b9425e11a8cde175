"""Commands that read runs and change nothing: list, status, export, audit."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedqueue.exit_codes import DONE, FAILED
from fedqueue_coordinator.cli.options import Json, Keys, Url


def list_runs(redis: Url = "", json: Json = False) -> None:
    """List the runs on the Redis server, and the results under runs/."""
    from fedqueue_coordinator.operator.runs import show_runs

    show_runs(redis, json)


def status(
    redis: Url = "",
    run: Annotated[
        str, typer.Option(metavar="NAME", help="The run's name; default: the only run there is.", show_default=False)
    ] = "",
    json: Json = False,
) -> None:
    """Show the state of a run: version, clients, open jobs, rejections, newest metrics."""
    from fedqueue_coordinator.operator.runs import show_status

    show_status(redis, run, json)


def export(
    run: Annotated[str, typer.Argument(metavar="RUN", help="The run's name.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="Write the model to FILE.")],
    version: Annotated[
        int | None,
        typer.Option(metavar="V", help="A version that is still stored; default: the newest.", show_default=False),
    ] = None,
    redis: Url = "",
    keys: Keys = Path("keys"),
) -> None:
    """Write a version of the model as safetensors: a plain state_dict.

    A model out of Redis is verified if the folder --keys has the coordinator's public key.
    """
    from fedqueue_coordinator.operator.export import export_model

    exported, doubt = export_model(redis, run, version, output, keys)
    typer.echo(f"version {exported} of {run} is in {output}{f' (not verified: {doubt})' if doubt else ''}")


def audit(
    run: Annotated[str, typer.Argument(metavar="RUN|DIR", help="The run's name, or the folder of its results.")],
    redis: Url = "",
    keys: Keys = Path("keys"),
) -> None:
    """Check that each job ended once, each update was merged at most once, and no version is missing.

    Exits with 1 on a violation. If the folder --keys has the coordinator's public key, its signatures are verified too.
    """
    from fedqueue_coordinator.operator.reports.audit import run_audit

    raise typer.Exit(DONE if run_audit(run, redis, keys) else FAILED)
