"""The app `fedqueue`, which the operator of a federation runs. Its commands import torch only where they train."""

from __future__ import annotations

from typing import Annotated

import typer

from fedqueue import __version__
from fedqueue.exit_codes import run_app
from fedqueue_coordinator.cli.compare import COMPARE_EPILOG, compare
from fedqueue_coordinator.cli.dashboard import DASHBOARD_EPILOG, dashboard
from fedqueue_coordinator.cli.describe import DESCRIBE_EPILOG, describe
from fedqueue_coordinator.cli.init import init
from fedqueue_coordinator.cli.leak import LEAK_EPILOG, leak
from fedqueue_coordinator.cli.privacy import PRIVACY_EPILOG, privacy
from fedqueue_coordinator.cli.processes import RUN_EPILOG, WORKER_SETTINGS, coordinator, run, worker
from fedqueue_coordinator.cli.reading import audit, export, list_runs, status
from fedqueue_coordinator.cli.remove import remove
from fedqueue_coordinator.cli.renamed import CommandsWithFormerNames
from fedqueue_coordinator.cli.security import acl, certs, enroll, keygen, revoke
from fedqueue_coordinator.cli.track import TRACK_EPILOG, track

EPILOG = """
Examples:

- `fedqueue init mine && fedqueue run mine/federation.toml` writes an example and runs it on this machine.

- `fedqueue enroll --config federation.toml` makes keys for a run on several machines.

- `fedqueue coordinator federation.toml -u redis://HOST:6379` leads that run; each site runs `fedqueue-worker`.

- `fedqueue status -u redis://HOST:6379` shows its state.
"""

app = typer.Typer(
    cls=CommandsWithFormerNames,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",  # wraps paragraphs, and shows [task] unchanged
    no_args_is_help=True,
    help="Asynchronous federated learning over Redis and RQ.",
    epilog=EPILOG,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fedqueue {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


PROCESSES, READING, SECURITY = "Take part in a run", "Runs and results", "Keys and access"

app.command()(init)
app.command(rich_help_panel=PROCESSES, epilog=RUN_EPILOG)(run)
app.command(rich_help_panel=PROCESSES)(coordinator)
app.command(rich_help_panel=PROCESSES, context_settings=WORKER_SETTINGS)(worker)
app.command(rich_help_panel=PROCESSES, epilog=DESCRIBE_EPILOG)(describe)
app.command(rich_help_panel=READING, name="list")(list_runs)
app.command(rich_help_panel=READING)(status)
app.command(rich_help_panel=READING, epilog=DASHBOARD_EPILOG)(dashboard)
app.command(rich_help_panel=READING, epilog=TRACK_EPILOG)(track)
app.command(rich_help_panel=READING)(export)
app.command(rich_help_panel=READING)(audit)
app.command(rich_help_panel=READING)(remove)
app.command(rich_help_panel=READING, epilog=COMPARE_EPILOG)(compare)
app.command(rich_help_panel=READING, epilog=LEAK_EPILOG)(leak)
app.command(rich_help_panel=READING, epilog=PRIVACY_EPILOG)(privacy)
app.command(rich_help_panel=SECURITY)(acl)
app.command(rich_help_panel=SECURITY)(certs)
app.command(rich_help_panel=SECURITY)(enroll)
app.command(rich_help_panel=SECURITY)(keygen)
app.command(rich_help_panel=SECURITY)(revoke)


def main() -> None:
    """Run `fedqueue` with the arguments of this process."""
    run_app(app)
