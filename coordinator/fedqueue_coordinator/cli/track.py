"""`fedqueue track`: shows a run in TensorBoard, MLflow or Weights & Biases, live or afterwards."""

from __future__ import annotations

from typing import Annotated

import typer

from fedqueue.exit_codes import DONE, FAILED
from fedqueue_coordinator.cli.options import Url

TRACK_EPILOG = """
Examples:

- `fedqueue track digits --to tensorboard:events` follows the run digits until it ends.

- `fedqueue track runs/digits --to mlflow:http://localhost:5000` shows a run that has ended.

- `fedqueue track digits --to hooks.py:Printer` calls hooks of your own.
"""


def track(
    run: Annotated[str, typer.Argument(metavar="RUN|DIR", help="The run's name, or the folder of its results.")],
    to: Annotated[
        list[str],
        typer.Option(
            "--to",
            "-t",
            metavar="TRACKER[:WHERE]",
            help="tensorboard:DIR, mlflow:URI, wandb:PROJECT, or path/to/file.py:Class. May be repeated.",
        ),
    ],
    online: Annotated[
        bool, typer.Option("--online", help="wandb: send to its server; default: files for `wandb sync`.")
    ] = False,
    redis: Url = "",
) -> None:
    """Show a run in TensorBoard, MLflow or Weights & Biases: follow it while it is in Redis, or read its results.

    Reads the ledger from its beginning, and in Redis then what is added to it, until the run ends. The rights of the
    Redis user `viewer` suffice. Ctrl-C stops following; the run is not affected.
    """
    from fedqueue.logs import configure_logging
    from fedqueue_coordinator.operator.track import track_run

    configure_logging()
    raise typer.Exit(DONE if track_run(run, redis, to, online) else FAILED)
