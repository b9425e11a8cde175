"""`fedqueue describe`: statistics of the sites' data before any training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedqueue.exit_codes import DONE, FAILED
from fedqueue_coordinator.cli.options import ConfigPath, ConfiguredUrl, Json, Sets

DESCRIBE_EPILOG = """
Examples:

- `fedqueue describe federation.toml` describes the data of all clients on this machine.

- `fedqueue describe federation.toml -u redis://HOST:6379` asks the sites, whose workers wait for the run.

- `fedqueue describe federation.toml --set statistics.min_count=20 --output runs/data.json` chooses the minimum.
"""


def describe(
    config: ConfigPath,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE.json",
            help="Write FILE.json, and a picture beside it; default: statistics.file, else describe.json.",
            show_default=False,
        ),
    ] = None,
    redis: ConfiguredUrl = "",
    wait: Annotated[
        float, typer.Option(metavar="SECONDS", min=1, help="With Redis: how long to wait for the workers' answers.")
    ] = 60.0,
    json: Json = False,
    set_: Sets = None,
) -> None:
    """Show counts, missing values, means, deviations, quantiles, histograms and shares of what `Task.table` returns.

    The figures are those of all rows together, exact for counts, means and deviations; a quantile comes with its bound.
    No figure of a site is about fewer rows than statistics.min_count. Trains nothing.
    With --redis or redis.url, the workers that wait for the run to begin answer, each under its site's policy;
    without, the data of all clients is on this machine.
    """
    from fedqueue_coordinator.operator.describe import describe as describe_data

    raise typer.Exit(DONE if describe_data(config, set_ or [], output, json, redis, wait) else FAILED)
