"""The command that writes a starting point for a new project."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer


def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder to create.")],
) -> None:
    """Write a commented example that runs unchanged: task.py, federation.toml, README.md."""
    from fedqueue_coordinator.operator.scaffold import write_scaffold

    write_scaffold(folder)
    typer.echo(f"Try it:  fedqueue run {os.path.join(folder, 'federation.toml')}")
