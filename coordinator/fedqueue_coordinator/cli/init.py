"""The command that writes a starting point for a new project."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer


def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder to create.")],
    private: Annotated[
        bool,
        typer.Option(
            "--private", help="With two keepers, so that the operator reads no update, and noise that protects rows."
        ),
    ] = False,
) -> None:
    """Write a commented example that runs unchanged: task.py, federation.toml, README.md."""
    from fedqueue_coordinator.operator.scaffold import write_scaffold

    write_scaffold(folder, private)
    typer.echo(f"Try it:  fedqueue run {os.path.join(folder, 'federation.toml')}")
