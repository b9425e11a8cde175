"""Options that several commands share. A command imports its work late, so that `--help` answers at once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG.toml", help="The configuration of the run.")]
Url = Annotated[
    str,
    typer.Option(
        "--redis", "--url", "-u", metavar="URL", show_default=False,
        help="The Redis server (redis://…, rediss://…, unix://…); default: FEDQUEUE_REDIS__URL, else the servers of "
        "local runs and localhost.",
    ),
]  # fmt: skip
ConfiguredUrl = Annotated[
    str,
    typer.Option(
        "--redis", "--url", "-u", metavar="URL", show_default=False,
        help="The Redis server (redis://…, rediss://…, unix://…); default: redis.url.",
    ),
]  # fmt: skip
Sets = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        "-s",
        metavar="KEY=VALUE",
        help="Override a key of CONFIG.toml: training.batch_size=64. May be repeated.",
    ),
]
ResultsFolder = Annotated[
    Path | None,
    typer.Option("--output", "-o", metavar="DIR", help="Write results to DIR; default: runs/NAME.", show_default=False),
]
Keys = Annotated[Path, typer.Option(metavar="DIR", help="The coordinator's key folder (security.keys).")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Log debug lines too, such as each committed version.")]
Overwrite = Annotated[
    bool,
    typer.Option(
        "--overwrite", help="Start over where DIR has an unfinished run, and replace results of another configuration."
    ),
]
Metrics = Annotated[
    str,
    typer.Option(
        metavar="ADDRESS", show_default=False,
        help="Serve metrics for Prometheus there: HOST:PORT, or a port of loopback; default: "
        "observability.metrics_address.",
    ),
]  # fmt: skip


def metrics_override(address: str) -> list[str]:
    """The override that stands for the option --metrics."""
    return [f"observability.metrics_address={address}"] if address else []
