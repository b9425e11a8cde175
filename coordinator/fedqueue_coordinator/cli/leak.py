"""The command that measures what could be learned from a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedqueue.exit_codes import FAILED
from fedqueue_coordinator.cli.options import Sets

LEAK_EPILOG = """
Examples:

- `fedqueue leak federation.toml` rehearses the run under the virtual clock, and attacks what was sent.

- `fedqueue leak digits` attacks the run `digits`, which had `ledger.keep_payloads = true`.

- `fedqueue leak federation.toml --also lira --also optimisation` tries the attacks that take minutes, too.

- `fedqueue leak federation.toml --at-most rows=0.01 --at-most membership=0.05` exits with 1 where more leaks, for CI.

- `fedqueue-worker federation.toml --client north --leak north-leak` measures one site's own update, at the site.
"""


def leak(
    subject: Annotated[
        str,
        typer.Argument(metavar="CONFIG.toml|RUN|DIR", help="A configuration, a run's name, or its folder of results."),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="DIR",
            show_default=False,
            help="Write leak.json and leak.png to DIR; default: the run's folder, or runs/NAME-leak.",
        ),
    ] = None,
    at_most: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ATTACK=NUMBER",
            help="Exit with 1 if the attack's value is above its control by more. May be repeated.",
        ),
    ] = None,
    updates: Annotated[
        int, typer.Option(metavar="N", min=8, help="Attack about N updates, in groups of 8 spread over the run.")
    ] = 32,
    references: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=0,
            max=256,
            show_default=False,
            help="Reference models for the attacks on the last model; 0: without. Default: 2, with LiRA 64.",
        ),
    ] = None,
    also: Annotated[
        list[str] | None,
        typer.Option(
            metavar="lira|optimisation",
            help="Try an attack that takes minutes too: LiRA on the last model, rows by optimisation. May be repeated.",
        ),
    ] = None,
    set_: Sets = None,
) -> None:
    """Measure what could be learned about the rows of clients: labels, rows, membership, each with a control.

    The task's rows must be on this machine: a rehearsal on public rows, or a benchmark. A site measures its own.
    """
    from fedqueue_coordinator.operator.leak import Effort, measure_leak

    effort = Effort(updates, references, frozenset(also or ()))
    if not measure_leak(subject, set_ or [], output, effort, at_most or []):
        raise typer.Exit(FAILED)
