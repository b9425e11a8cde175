"""The command that shows runs as a web page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedqueue.errors import ConfigurationError
from fedqueue_coordinator.cli.options import Url

DASHBOARD_EPILOG = """
Examples:

- `fedqueue dashboard` shows the runs on this machine, and the results under runs/.

- `fedqueue dashboard -u rediss://viewer@HOST:6379` follows runs on a server; the rights of the user `viewer` suffice.

- `fedqueue dashboard runs/digits` shows a run that has ended.

- `fedqueue dashboard --address 0.0.0.0:8470 --password-file secret --certificate page.crt --key page.key` lets others
  look, behind a login.
"""


def dashboard(
    runs: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RUN|DIR]…", help="Runs in Redis, or folders of results; default: all that are found."),
    ] = None,
    address: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Where the page is; port 0: any.")
    ] = "127.0.0.1:8470",
    password_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", show_default=False,
            help="Ask for the password in FILE; default: off loopback one that is made and printed.",
        ),
    ] = None,
    certificate: Annotated[
        Path | None, typer.Option(metavar="FILE", show_default=False, help="Speak TLS with this certificate.")
    ] = None,
    key: Annotated[Path | None, typer.Option(metavar="FILE", show_default=False, help="Its private key.")] = None,
    redis: Url = "",
) -> None:  # fmt: skip
    """Show runs as a web page, live and afterwards: is a run well, which site is not, and who has to do what.

    Reads only: nothing on the page changes a run, and a run does not notice the page. Ctrl-C ends it.
    """
    from fedqueue_coordinator.operator.dashboard.serving import serve_dashboard

    if (certificate is None) != (key is None):
        raise ConfigurationError("--certificate", str(certificate or key), "comes with --key", "give both, or neither")
    serve_dashboard(runs or [], redis, address, password_file, certificate, key)
