"""The command that deletes a run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from fedqueue.errors import ConfigurationError
from fedqueue.exit_codes import FAILED
from fedqueue_coordinator.cli.options import Url


def remove(
    run: Annotated[str, typer.Argument(metavar="RUN", help="The run's name.")],
    redis: Url = "",
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="DIR", help="The folder of its results; default: runs/RUN.", show_default=False
        ),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Delete without a question.")] = False,
) -> None:
    """Delete a run from Redis, and its results, logs and checkpoint from disk, after a question.

    The question lists what will be deleted. Keys, egress logs, and files that fedqueue has not made stay. A run that a
    coordinator leads is refused.
    """
    from fedqueue_coordinator.operator.removal import plan_removal

    if not yes and not sys.stdin.isatty():
        problem = "missing, and there is no terminal to ask on"
        raise ConfigurationError("--yes", None, problem, "pass --yes to delete without a question")
    removal = plan_removal(run, redis, output)
    typer.echo(f"run {run}:")
    for line in removal.describe():
        typer.echo(f"  {line}")
    if not yes and not typer.confirm("Delete it? This cannot be undone."):
        typer.echo("nothing was deleted")
        raise typer.Exit(FAILED)
    removal.carry_out()
    typer.echo(f"{run} is deleted")
